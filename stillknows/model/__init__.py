"""A model as it is stored, read and run: tokens in, log-probabilities and answers out."""
