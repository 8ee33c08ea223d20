"""How many rows to take at a time, so that a chain of operations finds its rows in cache and not in memory."""

from torch import Tensor

_NUMBERS = 1 << 19  # of one operand: 2 MB in fp32


def tiles(x_N: Tensor) -> list[slice]:
    """Consecutive ranges of the first dimension of x; a device other than the CPU takes all of it at once."""
    count = max(1, len(x_N))
    step = max(1, _NUMBERS * count // max(1, x_N.numel())) if x_N.device.type == "cpu" else count
    return [slice(start, min(start + step, len(x_N))) for start in range(0, len(x_N), step)]
