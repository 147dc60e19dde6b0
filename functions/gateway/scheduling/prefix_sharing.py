"""Prefix sharing: the keys of prefix chains, and leaders that compute a prefix for their followers.

The time of a cache hit tells a client that another one has sent the same text, so the configuration says which requests share.

Sequences that begin alike and arrive together compute their common prefix once. The first sequence is the leader. The others
are its followers: they have memory and a place in a micro-batch, and wait. When every stage holds the prefix, the followers ask
for their reservation again. The reply says how many tokens need not be computed.
"""

from dataclasses import dataclass
from typing import Final

from eventing.wire.prefix_chain import BLOCK_TOKENS, Chain, chain_key, common_blocks, extended
from functions.gateway.scheduling.sequence import Prompt, Sequence
from functions.gateway.scheduling.state import SchedulerState

MIN_SHARED_TOKENS: Final = 64  # a shorter prefix is computed sooner than waited for


@dataclass(frozen=True, slots=True)
class PrefixSharing:
    """Decides which requests share cached prefixes: those whose prefix chains have equal keys."""

    pipeline: str  # its fingerprint
    mode: str  # pipeline: all requests share; client: those of one client; request: only the answers of one; off: none

    def key(self, prompt: Prompt) -> bytes | None:
        """Returns the key of the prompt's prefix chain. Prompts with equal keys share cached prefixes.

        Returns None if there is no prefix caching. A `cache_salt` narrows sharing to requests with the same salt. In the mode
        `request`, a request without a salt shares only among its own answers.
        """
        if self.mode == "off":
            return None
        client = prompt.client_id if self.mode == "client" else ""
        if prompt.cache_salt:
            return chain_key(self.pipeline, f"{client} salt {prompt.cache_salt}", prompt.adapter)
        sharer = f" request {prompt.request_secret}" if self.mode == "request" else client
        return chain_key(self.pipeline, sharer, prompt.adapter)

    def leaves_kv(self, prompt: Prompt) -> bool:
        """Returns whether other answers may reuse the KV that the answer to this prompt leaves when it ends."""
        return self.mode != "off" and (self.mode != "request" or bool(prompt.cache_salt) or not prompt.is_only_answer)


def prompt_chain(sharing: PrefixSharing, prompt: Prompt) -> tuple[bytes | None, Chain]:
    """Returns the key and the prefix chain of a prompt, or (None, ()) without prefix caching.

    The chain covers all tokens but the last, which has to be computed in any case.
    """
    key = sharing.key(prompt)
    return key, () if key is None else extended((), prompt.token_ids[:-1], key)


def follow(sequence: Sequence, state: SchedulerState) -> None:
    """Makes `sequence` the follower of the sequence on the same route that computes the longest common prefix.

    Does nothing unless that prefix is at least MIN_SHARED_TOKENS longer than what every stage holds already. Call it after the
    reservation is granted and before a chunk is sent. `sequence` then waits until `leader_is_done`.
    """
    if sequence.follow_failed or sequence.retry_budget.failures_here or not sequence.at_rest or sequence.stream.over:
        return
    assert sequence.route is not None
    leader, leader_tokens = None, min(sequence.progress.held) + MIN_SHARED_TOKENS - 1
    for batch in state.micro_batches:
        for other in batch.sequences if batch.route.instances == sequence.route.instances else ():
            shared = BLOCK_TOKENS * common_blocks(sequence.reserved_chain, other.reserved_chain)
            if shared > leader_tokens and other is not sequence and _computes(other):
                leader, leader_tokens = other, shared
    if leader is not None:
        sequence.leader, sequence.leader_tokens = leader, leader_tokens


def leader_is_done(sequence: Sequence, state: SchedulerState) -> bool:
    """Returns whether a follower shall ask for its reservation again: its leader has computed the prefix, or never will."""
    leader = sequence.leader
    if leader is None or not sequence.at_rest or sequence.must_restart or sequence.stream.over:
        return False
    if leader.id not in state.sequences or not _computes(leader) or leader.route is None or sequence.route is None:
        return True
    if leader.route.instances != sequence.route.instances:
        return True
    return min(leader.progress.held) >= sequence.leader_tokens


def stop_following(sequence: Sequence, held_before: int) -> None:
    """Ends the wait of a follower after its repeated reservation was granted.

    `held_before` is the number of its tokens that every stage held before the reservation. If they hold no more now, although
    the leader has computed the prefix, the sequence does not follow again.
    """
    assert sequence.leader is not None
    found_nothing = min(sequence.progress.held) <= held_before
    sequence.follow_failed = found_nothing and min(sequence.leader.progress.held) >= sequence.leader_tokens
    sequence.leader = None


def _computes(sequence: Sequence) -> bool:
    """Whether the sequence can be a leader: it has memory, follows no other, has not ended and has not failed lately."""
    if not sequence.has_memory or sequence.leader is not None:
        return False
    return not (sequence.stream.over or sequence.must_restart or sequence.retry_budget.failures_here)
