"""How many rows to take at a time, so that a chain of operations finds its rows in cache and not in memory."""

from torch import Tensor

_NUMBERS = 1 << 19  # of one operand: 2 MB in fp32


def tiles(x_ND: Tensor) -> list[slice]:
    """Consecutive row ranges of x; a device other than the CPU takes all rows at once."""
    count, width = x_ND.shape
    step = max(1, _NUMBERS // width) if x_ND.device.type == "cpu" else max(1, count)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
