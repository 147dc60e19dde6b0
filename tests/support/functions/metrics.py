"""What functions say of themselves at their port for metrics."""

import re

from tests.support.functions.functions import FunctionProcess


def metric(function: FunctionProcess, name: str) -> float:
    """Summed over its labels; 0 where there is none yet."""
    page: str = function.get("/metrics")[1]
    values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
    return sum(map(float, values))
