"""A training step cut into stages on ranks: the problem, its schedules, and what a schedule takes in time and bytes."""
