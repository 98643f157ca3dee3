"""Progress bars: lively in a terminal, a line now and then in a log."""

import os
import sys
from collections.abc import Iterable
from typing import Any, TypeAlias

from tqdm import tqdm

Progress: TypeAlias = "tqdm[Any]"  # an iterable with `update` and `set_postfix`

LOG_INTERVAL_S = 15
LOG_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"


def progress(
    over: Iterable[Any] | None = None,
    *,
    total: int | None,
    description: str,
    initial: int = 0,
    unit: str = "image",
) -> Progress:
    """A bar on stderr, over images or bytes ("B"), with how many a second and the time left."""
    terminal = sys.stderr.isatty()
    bar: Progress = tqdm(
        over,
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=unit == "B",
        mininterval=0.1 if terminal else LOG_INTERVAL_S,
        bar_format=None if terminal else LOG_FORMAT,
        disable=os.environ.get("RANK", "0") != "0",  # of torchrun's processes one speaks
    )
    return bar
