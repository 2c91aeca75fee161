"""Sizes of the kernels' grids and tiles. Triton's own functions for these can be called in kernels too, which makes a call of
them take microseconds; a layer has a hundred, a tenth of the time that its launches took.
"""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
