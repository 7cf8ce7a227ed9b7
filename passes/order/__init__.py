"""When each operator runs."""
