"""Runs a planned program on the device it was made for: its arena, its launches, its streams."""
