"""Who may find what whose prompts left at the stages: a hit is visible in its time, so it tells what somebody has asked."""

from collections.abc import Callable

from eventing.wire.prefix_chain import Chain, chain_key, extended
from functions.gateway.scheduling.prompt import Prompt

KeyOf = Callable[[str], bytes | None]
"""The key of a client's chains, by its id. None: it finds nothing, and leaves nothing."""


def nobody(client_id: str) -> None:
    """Nothing is shared with anybody, or reused."""


def keys_of(pipeline: str, sharing: str) -> KeyOf:
    """pipeline: its fingerprint. sharing: `pipeline`, all clients share; `client`, each with itself; `off`: `nobody`."""
    if sharing == "off":
        return nobody
    if sharing == "client":
        return lambda client_id: chain_key(pipeline, client_id)
    whole = chain_key(pipeline, "")
    return lambda client_id: whole


def beginning(key_of: KeyOf, prompt: Prompt) -> tuple[bytes | None, Chain]:
    """The key of a prompt's chain, and the chain of its tokens but the last, which has to be computed."""
    key = key_of(prompt.client_id)
    return key, () if key is None else extended((), prompt.token_ids[:-1], key)
