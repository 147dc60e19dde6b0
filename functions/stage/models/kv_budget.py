"""The accounting of a KV cache: which sequences have how much reserved, and how much of it is filled."""

from dataclasses import dataclass

from functions.stage.models.layer_group import KVCacheFull


@dataclass(slots=True)
class _Reservation:
    tokens: int
    length: int = 0


class KVBudget:
    """Implements `KVCache` but for the memory itself, which the layer groups built on it own."""

    def __init__(self, capacity_tokens: int, block_tokens: int = 1) -> None:
        """block_tokens: a reservation takes whole blocks, and a capacity that is none is not used to its end."""
        self._capacity_tokens = capacity_tokens // block_tokens * block_tokens
        self._block_tokens = block_tokens
        self._reserved_tokens = 0
        self._reservations: dict[int, _Reservation] = {}
        self._released_handles: list[int] = []

    @property
    def capacity_tokens(self) -> int:
        return self._capacity_tokens

    @property
    def free_tokens(self) -> int:
        return self._capacity_tokens - self._reserved_tokens

    @property
    def resident_bytes(self) -> int:
        return 0

    def reserve(self, tokens: int) -> int:
        if self.taken(tokens) > self.free_tokens:
            raise KVCacheFull(tokens, self.free_tokens)
        handle = self._released_handles.pop() if self._released_handles else len(self._reservations)
        self._reservations[handle] = _Reservation(tokens)
        self._reserved_tokens += self.taken(tokens)
        return handle

    def taken(self, tokens: int) -> int:
        """What a reservation of `tokens` takes."""
        return -(-tokens // self._block_tokens) * self._block_tokens

    def reserved(self, handle: int) -> int:
        return self._reservations[handle].tokens

    def length(self, handle: int) -> int:
        return self._reservations[handle].length

    def extend(self, handle: int, tokens: int) -> None:
        """Counts `tokens` as held: for the layer group, once a pass is done."""
        self._reservations[handle].length += tokens

    def truncate(self, handle: int, length: int) -> None:
        reservation = self._reservations[handle]
        reservation.length = min(reservation.length, length)

    def resize(self, handle: int, tokens: int) -> None:
        """It has `tokens` reserved from now on; whether there is room for more is the caller's to know."""
        reservation = self._reservations[handle]
        self._reserved_tokens += self.taken(tokens) - self.taken(reservation.tokens)
        reservation.tokens = tokens

    def release(self, handle: int) -> None:
        self._reserved_tokens -= self.taken(self._reservations.pop(handle).tokens)
        self._released_handles.append(handle)
