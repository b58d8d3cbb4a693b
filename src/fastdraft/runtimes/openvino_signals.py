"""Keeps Ctrl-C working in a process that loads and unloads OpenVINO models.

Decides that after every load the thread's signal stack is what it was before. OpenVINO's CPU plugin sets a stack of its own and, when
it goes, puts back the one that it had found; two plugins that do not go in reverse order leave one that is gone, and the next
signal is a segmentation fault (release 2026.4.1, Linux). Where each plugin finds the process's own stack, putting it back is
right in any order.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator


class _SignalStack(ctypes.Structure):
    """`stack_t` of sigaltstack(2)."""

    _fields_ = [("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t)]


@contextlib.contextmanager
def keeping_signal_stack() -> Iterator[None]:
    """Around whatever loads a plugin; does nothing where there is no such stack to keep."""
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
