"""Timings as ratios in one run against a named alternative. Not tests: machines differ and are shared."""
