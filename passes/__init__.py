"""Passes: one decision a folder, one method a file; a pass is named by its path."""
