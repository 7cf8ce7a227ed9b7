"""What of a training step's forward half is kept, computed again, or offloaded to host memory."""
