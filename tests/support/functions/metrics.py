"""Reads metrics of function processes."""

import re

from tests.support.functions.functions import FunctionProcess


def metric(function: FunctionProcess, name: str) -> float:
    """Sum over all labels; 0 if there is none yet."""
    page: str = function.get("/metrics")[1]
    values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
    return sum(map(float, values))
