"""Where each residence lies."""
