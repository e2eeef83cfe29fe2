"""Plug-ins that score observations: one number per example, or figures of a whole model."""
