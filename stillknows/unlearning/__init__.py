"""Terms, masks and steps put together into runs that take knowledge out of a model."""
