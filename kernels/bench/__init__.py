"""How good each kernel is: measured beside its peers on a GPU, compiled and inspected without one."""
