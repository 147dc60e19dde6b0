"""The objective of a pipeline: the latency that its answers shall keep.

The gateway counts the answers that keep it and schedules for it; settings of a spec are derived from it.
"""

from typing import Annotated, Final

import msgspec
from msgspec import Meta

_DEMAND_SHARE: Final = 0.35  # of the first token's seconds: bursts of a second stay below it, and time is left to start a pod
_Seconds = Annotated[float, Meta(gt=0, le=3600)]


class Objective(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The latency that an answer shall keep: a limit for its first token, and one for the mean time of each further token."""

    first_token_seconds: _Seconds  # from the request
    token_seconds: _Seconds  # mean of an answer's tokens after the first
    share: Annotated[float, Meta(gt=0, lt=1)] = 0.95  # of all answers that shall be within

    @property
    def prompt_seconds(self) -> float:
        """How long prompts may wait for a stage before the stage counts as lacking instances."""
        return _DEMAND_SHARE * self.first_token_seconds

    def met(self, first_token_seconds: float, total_seconds: float, tokens: int) -> bool:
        """Returns whether an answer of `tokens` tokens keeps the objective. Both times begin with the request."""
        later = (total_seconds - first_token_seconds) / max(1, tokens - 1)
        return first_token_seconds <= self.first_token_seconds and later <= self.token_seconds
