"""Pipeline-parallel schedules: the order in which each rank works on microbatches, and where the model is cut."""
