"""Plug-ins that take knowledge out of a model: terms, steps, edits, and recipes that put them together."""
