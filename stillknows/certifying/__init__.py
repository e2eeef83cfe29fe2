"""Certificates: a signed statement of what was audited and found, and whether it fits a model."""
