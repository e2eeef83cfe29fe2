"""What is done to a model before it is asked: chains of transforms, applied and undone."""
