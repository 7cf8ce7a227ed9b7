"""The one place that talks to PuLP, HiGHS and CP-SAT."""
