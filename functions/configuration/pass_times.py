"""What a pass of a stage takes on a device that is not here: the one formula that the sleeping layer group waits by and
`bench/evaluation` simulates by.

    forward = fixed + max(token · tokens + pair · pairs, stream + stream_token · tokens + kv_token · kv tokens)
    logits  = max(logits_row · rows, logits_stream)                               the last stage's, where a row wants a token

The two terms of the maximum are a roofline: arithmetic on one side, bytes out of the device's memory on the other.
"""

from typing import Annotated, Final

import msgspec

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]


class PassTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds, each of one pass or of one more of what its name says."""

    fixed_seconds: _Seconds = 0.0
    """Whatever the pass holds: launches, a step of the host."""
    token_seconds: _Seconds = 0.0
    """Arithmetic of one new token in all matrices of the stage."""
    pair_seconds: _Seconds = 0.0
    """Arithmetic of one new token's attention to one token before it."""
    stream_seconds: _Seconds = 0.0
    """All matrices of the stage once through the device's memory."""
    stream_token_seconds: _Seconds = 0.0
    """What one new token adds to it; nothing on a GPU, the vectors' own work on a CPU."""
    kv_token_seconds: _Seconds = 0.0
    """Keys and values of one token once through the device's memory."""
    logits_row_seconds: _Seconds = 0.0
    logits_stream_seconds: _Seconds = 0.0

    def forward_seconds(self, tokens: float, pairs: float, kv_tokens: float) -> float:
        """tokens: new ones of all rows. kv_tokens: held behind the pass, of all rows. pairs: sum of `pairs` of the rows."""
        arithmetic = self.token_seconds * tokens + self.pair_seconds * pairs
        streamed = self.stream_seconds + self.stream_token_seconds * tokens + self.kv_token_seconds * kv_tokens
        return self.fixed_seconds + max(arithmetic, streamed)

    def logits_seconds(self, rows: float) -> float:
        return max(self.logits_row_seconds * rows, self.logits_stream_seconds) if rows else 0.0


def pairs(position: float, length: float) -> float:
    """Of a row: each of its new tokens with itself and every token before it."""
    return length * (position + (length + 1) / 2)


def parse_pass_times(text: str) -> PassTimes:
    """Raises ValueError that says what is allowed."""
    try:
        return msgspec.json.decode(text, type=PassTimes)
    except msgspec.MsgspecError as error:
        raise ValueError(f"an object of JSON with any of {', '.join(_FIELDS)}, numbers from 0 to 3600 ({error})") from error


_FIELDS: Final = PassTimes.__struct_fields__
