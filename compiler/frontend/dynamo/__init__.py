"""The ``torch.compile`` backend: Inductor's kernels under a plan of ours."""
