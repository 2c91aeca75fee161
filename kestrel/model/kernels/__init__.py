"""Fused operations: Triton kernels on a GPU, and their plain forms for a CPU."""
