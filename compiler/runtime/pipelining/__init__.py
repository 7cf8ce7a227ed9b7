"""Pipeline schedules run by torch.distributed.pipelining: emitted, checked as lowered, executed, timed."""
