"""Timings as ratios in one run against a named alternative, and every architecture against its own forward pass. Not
tests: machines differ and are shared, and all architectures take minutes."""
