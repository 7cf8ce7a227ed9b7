"""A model as a chain of layers: where it may be cut, what each layer costs, and stages as modules of their own."""
