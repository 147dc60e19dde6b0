"""The query of a GET request with which one instance of a stage asks another for the keys and values of some tokens.

The reply is 200 with bytes in the format of functions/stage/models/kv_bytes.py, or 204 if that instance does not have them.
"""

from typing import Annotated, Final
from urllib.parse import parse_qsl, urlencode

import msgspec
from msgspec import Meta, Struct

from eventing.problems import MalformedEvent
from eventing.wire.control import Attempt, SequenceId
from eventing.wire.events import MAX_POSITION
from eventing.wire.prefix_chain import BLOCK_TOKENS, DIGEST_BYTES, LINEAGE

KV_PATH: Final = "/kv"
HELD_HEADER: Final = "lamina-held"  # of a reply to a query by sequence id: how many tokens of the sequence are held
MAX_QUERY_TOKENS: Final = 64 * BLOCK_TOKENS


class KVQuery(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Asks for the KV of tokens [first, end).

    The tokens are those of the sequence `id`, or of any sequence whose prefix chain has `digest` at `end`. The KV must be of
    the given lineage.
    """

    pipeline: str
    layer: Annotated[int, Meta(ge=0)]  # the stage's first
    first: Annotated[int, Meta(ge=0, le=MAX_POSITION)]
    end: Annotated[int, Meta(ge=1, le=MAX_POSITION)]
    lineage: Annotated[str, Meta(pattern=f"^{LINEAGE.pattern}$")]
    # Hexadecimal, of the chain's block that ends at `end`, without lineage. Empty: only the sequence itself is wanted.
    digest: Annotated[str, Meta(pattern=rf"^([0-9a-f]{{{2 * DIGEST_BYTES}}})?$")] = ""
    id: SequenceId | None = None
    attempt: Attempt = 0
    source: str = ""  # of the gateway whose sequence it is

    def __post_init__(self) -> None:
        if not 0 < self.end - self.first <= MAX_QUERY_TOKENS:
            raise ValueError(f"tokens {self.first} to {self.end}; at least one, at most {MAX_QUERY_TOKENS}")
        if self.digest and self.end % BLOCK_TOKENS:
            raise ValueError(f"a digest stands for whole blocks of {BLOCK_TOKENS} tokens, not for {self.end}")

    @property
    def target(self) -> str:
        """Returns path and query of the GET request."""
        return f"{KV_PATH}?{urlencode(msgspec.to_builtins(self))}"

    @classmethod
    def read(cls, query: str) -> "KVQuery":
        """Parses the query of a request. Raises MalformedEvent."""
        try:
            return msgspec.convert(dict(parse_qsl(query, keep_blank_values=True, max_num_fields=16)), cls, strict=False)
        except (ValueError, msgspec.ValidationError) as error:
            raise MalformedEvent(f"{KV_PATH}: {error}") from error
