"""Reports of audits, and scores of saved observations and of published logs."""
