"""What answers shall keep. The gateway counts those that do, and decides with it; a spec's settings are derived from it."""

from typing import Annotated, Final

import msgspec
from msgspec import Meta

_DEMAND_SHARE: Final = 0.15  # of the first token's seconds: a pod that is asked for then takes much of the rest to start
_Seconds = Annotated[float, Meta(gt=0, le=3600)]


class Objective(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An answer is within the objective if its first token and the mean of its further tokens come in time."""

    first_token_seconds: _Seconds  # from the request
    token_seconds: _Seconds  # mean of an answer's tokens after the first
    share: Annotated[float, Meta(gt=0, lt=1)] = 0.95  # of all answers that shall be within

    @property
    def prompt_seconds(self) -> float:
        """How long prompts may wait for a stage before it is shown to lack instances."""
        return _DEMAND_SHARE * self.first_token_seconds

    def met(self, first_token_seconds: float, total_seconds: float, tokens: int) -> bool:
        """Whether an answer of `tokens` tokens is within. Both times begin with the request."""
        later = (total_seconds - first_token_seconds) / max(1, tokens - 1)
        return first_token_seconds <= self.first_token_seconds and later <= self.token_seconds
