"""Fused operations: Triton kernels on a GPU, and what stands in for them on a CPU."""
