"""What the configuration allows the scheduler; the meanings stand there."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    queue_limit: int = 256
    chunk_tokens: int = 256
    micro_batch_sequences: int = 8
    stages_at_once: int = 0
    draft_tokens: int = 0
    """0: nothing is drafted."""
    cold_start_timeout_seconds: float = 300.0
