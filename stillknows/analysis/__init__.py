"""What an update changes in stored weights, and what a format leaves of it."""
