"""What the allocator of the C library does with memory that is free again.

Left alone, glibc takes ever larger pieces from a heap that shrinks at its end only, once pieces of their size have been
freed: up to 32 MiB each. A run frees many sizes in turn, and holds up to 200 MB in holes.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's settings, malloc.h
_LARGE = 2**22  # bytes from which on a piece is a mapping of its own; smaller ones cost more page faults than they save


def return_freed_memory() -> bool:
    """Let pieces of memory go back to the system as soon as they are free; returns whether that could be arranged."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGE)) and bool(mallopt(_TRIM_THRESHOLD, _LARGE))


def trim() -> None:
    """Give pages back that are free now, also those between pieces in use: a block leaves many of them behind."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
