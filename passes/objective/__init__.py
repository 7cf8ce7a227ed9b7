"""What a plan is good for: traffic, peak, arena or latency, one after the other, and improving a plan by them."""
