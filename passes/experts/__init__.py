"""Which expert lives on which device: balance first, then the distance that tokens travel."""
