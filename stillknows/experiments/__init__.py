"""Many runs in one command: the built-in example, searches, sweeps and the validation of the metrics."""
