"""Log-probabilities as chat completions and completions write them."""

from collections.abc import Sequence
from typing import Any

from eventing.wire.generation import TokenLogprob
from functions.gateway.text.tokenizer import ModelText


def chat_logprobs(text: ModelText, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    def one(token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = text.token_bytes(token_id)
        return {"token": text.token_text(token_id), "logprob": logprob, "bytes": None if raw is None else list(raw)}

    content = [
        one(each.token_id, each.logprob) | {"top_logprobs": [one(token_id, logprob) for token_id, logprob in each.top]}
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(text: ModelText, logprobs: Sequence[TokenLogprob], offset: int, top: int) -> dict[str, Any]:
    """offset: characters of the tokens before these. top: how many were asked for; the token itself is among them, perhaps
    as one more."""
    texts = [text.token_text(each.token_id) for each in logprobs]
    offsets = [offset]
    for one in texts:
        offsets.append(offsets[-1] + len(one))
    return {
        "tokens": texts,
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": [_by_text(text, each) for each in logprobs] if top else None,
        "text_offset": offsets[:-1],
    }


def _by_text(text: ModelText, each: TokenLogprob) -> dict[str, float] | None:
    """Of tokens with the same text the most probable one counts. None of a text's first token."""
    if each.logprob is None:
        return None
    found: dict[str, float] = {}
    for token_id, logprob in (*each.top, (each.token_id, each.logprob)):
        found.setdefault(text.token_text(token_id), logprob)
    return found
