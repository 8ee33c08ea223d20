"""Memory that stays with the process: a page touched for the first time costs more than the arithmetic done on it."""

import ctypes
import sys

# glibc's numbers, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEEP = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask glibc to hand freed memory to the next allocation instead of the system; False where it cannot be asked.

    A training step frees and allocates the same large tensors again and again. By default each of them is mapped anew
    and its pages are zeroed by the kernel when first touched.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a C library without mallopt, such as musl
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEEP), (_M_TOP_PAD, 64 << 20))
    accepted = [mallopt(name, value) == 1 for name, value in settings]
    return all(accepted)
