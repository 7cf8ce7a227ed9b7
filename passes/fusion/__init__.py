"""Which fused kernels take which operators."""
