"""How the bytes of a KV arena are to be read, so that two of them may exchange some."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How an arena's bytes are to be read. Two arenas with equal layouts may exchange bytes."""

    kind: str
    """Who wrote them, and all that their bits depend on: `native float32 avx512`. At most 32 bytes."""
    num_layers: int
    kv_heads: int
    head_bytes: int
    """Of one key or value of one token and head, padding included."""
    block_tokens: int = 1
    """Ranges begin and end at multiples of it."""

    @property
    def token_bytes(self) -> int:
        return self.num_layers * 2 * self.kv_heads * self.head_bytes

    def rounded(self, tokens: int) -> int:
        """Up to whole blocks."""
        return -(-tokens // self.block_tokens) * self.block_tokens
