"""What one instance of a stage asks another for: keys and values of some tokens, as the query of a GET.

The answer is 200 with bytes as functions/stage/models/kv_bytes.py has them, or 204 where they are not held.
"""

from typing import Annotated, Final
from urllib.parse import parse_qsl, urlencode

import msgspec
from msgspec import Meta, Struct

from eventing.problems import MalformedEvent
from eventing.wire.control import Attempt, SequenceId
from eventing.wire.events import MAX_POSITION
from eventing.wire.prefix_chain import BLOCK_TOKENS, DIGEST_BYTES

KV_PATH: Final = "/kv"
HELD_HEADER: Final = "lamina-held"
"""Of an answer for a sequence by its id: how many tokens of it are held."""
MOST_TOKENS: Final = 64 * BLOCK_TOKENS
"""Of one query."""


class KVQuery(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Tokens [first, end) of a sequence that is moving, or of whatever has this digest at `end`."""

    pipeline: str
    layer: Annotated[int, Meta(ge=0)]
    """The stage's first."""
    first: Annotated[int, Meta(ge=0, le=MAX_POSITION)]
    end: Annotated[int, Meta(ge=1, le=MAX_POSITION)]
    digest: Annotated[str, Meta(pattern=rf"^([0-9a-f]{{{2 * DIGEST_BYTES}}})?$")] = ""
    """Hexadecimal; of the chain's block that ends at `end`. Empty: only the sequence will do."""
    id: SequenceId | None = None
    attempt: Attempt = 0
    source: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.end - self.first <= MOST_TOKENS:
            raise ValueError(f"tokens {self.first} to {self.end}; at least one, at most {MOST_TOKENS}")
        if self.digest and self.end % BLOCK_TOKENS:
            raise ValueError(f"a digest stands for whole blocks of {BLOCK_TOKENS} tokens, not for {self.end}")

    @property
    def target(self) -> str:
        """Path and query."""
        return f"{KV_PATH}?{urlencode(msgspec.to_builtins(self))}"

    @classmethod
    def read(cls, query: str) -> "KVQuery":
        """Raises MalformedEvent."""
        try:
            return msgspec.convert(dict(parse_qsl(query, keep_blank_values=True, max_num_fields=16)), cls, strict=False)
        except (ValueError, msgspec.ValidationError) as error:
            raise MalformedEvent(f"{KV_PATH}: {error}") from error
