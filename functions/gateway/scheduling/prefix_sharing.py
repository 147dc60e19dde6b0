"""Prefix sharing: the keys of prefix chains, and leaders that compute a prefix for their followers.

The time of a cache hit tells a client that another one has asked the same, so the configuration says which clients share.

Sequences that begin alike and arrive together compute their common prefix once. The first is the leader. The others, its
followers, have their memory and their place in a micro-batch, and wait. When every stage holds the prefix, the followers ask
for their reservation again, and the reply says how much they need not compute.
"""

from collections.abc import Callable
from typing import Final

from eventing.wire.prefix_chain import BLOCK_TOKENS, Chain, chain_key, common_blocks, extended
from functions.gateway.scheduling.sequence import Prompt, Sequence
from functions.gateway.scheduling.state import SchedulerState

MIN_SHARED_TOKENS: Final = 64  # a shorter prefix is computed sooner than waited for

KeyOf = Callable[[str], bytes | None]  # client id → key of the client's prefix chains; None: no prefix caching


def keys_of(pipeline: str, sharing: str) -> KeyOf:
    """pipeline: its fingerprint. sharing: `pipeline` (all clients share), `client` (each with itself), or `off`."""
    if sharing == "off":
        return lambda client_id: None
    if sharing == "client":
        return lambda client_id: chain_key(pipeline, client_id)
    shared = chain_key(pipeline, "")
    return lambda client_id: shared


def prompt_chain(key_of: KeyOf, prompt: Prompt) -> tuple[bytes | None, Chain]:
    """The key of the prompt's chain, and the chain of all its tokens but the last, which has to be computed."""
    key = key_of(prompt.client_id)
    return key, () if key is None else extended((), prompt.token_ids[:-1], key)


def follow(sequence: Sequence, state: SchedulerState) -> None:
    """Chooses the leader that saves a sequence most. It has its memory, and no chunk of it has been sent."""
    if sequence.follow_failed or sequence.retry_budget.failures_here or not sequence.at_rest or sequence.stream.over:
        return
    assert sequence.route is not None
    leader, leader_tokens = None, sequence.progress.held_everywhere + MIN_SHARED_TOKENS - 1
    for batch in state.micro_batches:
        for other in batch.sequences if batch.route.instances == sequence.route.instances else ():
            shared = BLOCK_TOKENS * common_blocks(sequence.reserved_chain, other.reserved_chain)
            if shared > leader_tokens and other is not sequence and _computes(other):
                leader, leader_tokens = other, shared
    if leader is not None:
        sequence.leader, sequence.leader_tokens = leader, leader_tokens


def leader_is_done(sequence: Sequence, state: SchedulerState) -> bool:
    """The prefix that a follower waits for is computed, or will not be: the follower shall ask for its reservation again."""
    leader = sequence.leader
    if leader is None or not sequence.at_rest or sequence.must_restart or sequence.stream.over:
        return False
    if leader.id not in state.sequences or not _computes(leader) or leader.route is None or sequence.route is None:
        return True
    if leader.route.instances != sequence.route.instances:
        return True
    return leader.progress.held_everywhere >= sequence.leader_tokens


def stop_following(sequence: Sequence, held_before: int) -> None:
    """The reservation was granted again. held_before: tokens that every stage held of the sequence before it."""
    assert sequence.leader is not None
    found_nothing = sequence.progress.held_everywhere <= held_before
    sequence.follow_failed = found_nothing and sequence.leader.progress.held_everywhere >= sequence.leader_tokens
    sequence.leader = None


def _computes(sequence: Sequence) -> bool:
    """It can be a leader."""
    if not sequence.reserved or sequence.leader is not None or sequence.stream.over or sequence.must_restart:
        return False
    return not sequence.retry_budget.failures_here
