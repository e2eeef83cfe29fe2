"""The optimisation loop and what a step is made of. It knows nothing of unlearning or of audits, which both train."""
