"""The duration of a stage's forward pass on an emulated device.

The layer group `sleep` waits for it instead of computing, and `bench/evaluation` simulates with it.

    forward = fixed + max(token · tokens + pair · pairs, stream + stream_token · tokens + kv_token · kv tokens)
    logits  = max(logits_row · rows, logits_stream)                               in the last stage, for rows that draw a token

The coefficients are the fields of PassTimes, in seconds: `token` is token_seconds, and so on. They are multiplied by numbers of
one pass: `tokens` are its new tokens; `pairs` are pairs of a new token and one that it attends to; `kv tokens` are all tokens
that its sequences have in the KV cache after it. The two terms of a maximum are a roofline: the time of the arithmetic, and the
time to read weights and KV from the device's memory.
"""

from typing import Annotated

import msgspec

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]


class PassTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    fixed_seconds: _Seconds = 0.0  # of every pass: kernel launches, a step of the host
    token_seconds: _Seconds = 0.0  # arithmetic of one new token in all matrices of the stage
    pair_seconds: _Seconds = 0.0  # arithmetic of one new token's attention to one token
    stream_seconds: _Seconds = 0.0  # reading all matrices of the stage from the device's memory once
    stream_token_seconds: _Seconds = 0.0  # what one new token adds to that: nothing on a GPU, work on vectors on a CPU
    kv_token_seconds: _Seconds = 0.0  # reading keys and values of one token once
    logits_row_seconds: _Seconds = 0.0  # arithmetic of the logits of one row
    logits_stream_seconds: _Seconds = 0.0  # reading the output matrix from the device's memory once

    def forward_seconds(self, tokens: float, pairs: float, kv_tokens: float) -> float:
        """Returns the seconds that a forward pass takes, without its logits.

        The arguments are sums over the rows of the pass. `tokens` counts new tokens. `pairs` are results of the function
        `pairs`. `kv_tokens` counts tokens in the KV cache after the pass.
        """
        arithmetic = self.token_seconds * tokens + self.pair_seconds * pairs
        streamed = self.stream_seconds + self.stream_token_seconds * tokens + self.kv_token_seconds * kv_tokens
        return self.fixed_seconds + max(arithmetic, streamed)

    def logits_seconds(self, rows: float) -> float:
        return max(self.logits_row_seconds * rows, self.logits_stream_seconds) if rows else 0.0


def pairs(position: float, length: float) -> float:
    """Returns the number of pairs of tokens in one row's attention: each new token with itself and every token before it.

    `position` is the number of tokens before the new ones, `length` the number of new tokens.
    """
    return length * (position + (length + 1) / 2)
