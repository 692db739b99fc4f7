"""Keeping the memory that torch frees: on a CPU it takes as long to get it back as to compute with it."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_TRIM = 2**30
_MMAP = (2**30, 2**25)  # bytes; some versions of the library refuse more than the second


@cache
def keep_freed_memory() -> bool:
    """Have the C library keep freed blocks of up to a gibibyte for the next step instead of returning them.

    A batch of images and its activations are megabytes, which glibc gets from the kernel anew at every step, page by
    page; on two cores this made batches two to four times slower. It holds for the whole process from the first call.

    Returns:
        Whether the library took it; False where it is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _TRIM)) and any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP)
