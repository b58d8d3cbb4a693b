"""Memory that a training step gives back stays with the process while it trains on a CPU.

Decides one thing: glibc returns large blocks to the system at once and asks for them again at the next step, and the system
clears every page anew; a step of a 1.5 M draft can spend more time there than on arithmetic (docs/performance.md). With other C libraries
nothing is changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # names of mallopt(3)
_NEVER = 2**31 - 1
_LARGEST_THRESHOLD = 32 << 20
"""Where glibc's own moving threshold ends."""


@contextlib.contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """While open, freed memory is kept for the next step; afterwards it goes back to the system. Only for a CPU and glibc."""
    libc = _glibc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, 65536)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt.argtypes, libc.malloc_trim.argtypes = [ctypes.c_int, ctypes.c_int], [ctypes.c_size_t]
    except (OSError, AttributeError):
        return None
    return libc
