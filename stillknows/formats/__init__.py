"""What deployment does to weights, activations and cache, and what it leaves of an update."""
