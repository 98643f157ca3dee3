"""Memory that was freed, back to the system."""

import ctypes
import sys
from functools import cache
from typing import Any


def trim() -> None:
    """glibc keeps what lies between pieces that are in use, of which networks leave much: after a
    few swaps as much again as they take. Some 50 ms for the caller alone; others go on."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    """None where there is no glibc."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
