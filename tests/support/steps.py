"""Work counted in lines of Python that run, which says the same on every machine, however busy."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest


def lines(act: Callable[[], object], *, expect: type[Exception] | None = None) -> int:
    """How many lines of Python `act` takes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        if expect is None:
            act()
        else:
            with pytest.raises(expect):
                act()
    finally:
        sys.settrace(before)
    return count
