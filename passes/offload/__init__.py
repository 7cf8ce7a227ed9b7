"""Work within a memory limit: what stays on the device, and what each call loads, stores and computes again."""
