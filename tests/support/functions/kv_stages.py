"""Engines over a tiny model in C, with tiers behind their memory: conversations that begin, end and go on."""

import ipaddress
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

from eventing.http.pod_network import PodNetwork
from eventing.wire.control import ReleaseRow, ReservedRow, ReserveRow
from eventing.wire.events import Status
from eventing.wire.prefix_chain import Chain, chain_key, extended, packed
from functions.stage.engine.engine import Engine
from functions.stage.engine.kv_tiers import MEMORY, ComputeRate, Reuse, Tier
from functions.stage.kv.fetching import Fetcher, FetchEstimate
from functions.stage.kv.peer_tier import PeerClient, PeerTier
from functions.stage.kv.store_tier import KVWriter, StoreTier
from functions.stage.models.kv_cache import KVBlocks
from functions.stage.models.layer_group import LayerGroup
from functions.stage.models.sleep_group import SleepKV
from storage.kv.kv_store import KVObjects, Retention
from storage.kv.sealed import Sealer
from storage.store.payload_store import PayloadStore
from tests.support.functions.native_models import CUT, native_groups
from tests.support.functions.stage_pipeline import engines, generate
from tests.support.functions.stage_server import FINGERPRINT, TOKEN, StageServer

LOOPBACK: Final = PodNetwork((ipaddress.ip_network("127.0.0.0/8"),), 0)
LAYERS: Final = (0, 6)
ONE_WEEK: Final = timedelta(days=7)
DTYPES: Final = ("float32", "bfloat16", "int8", "q4")
SEALER: Final = Sealer(b"k" * 32)


@dataclass
class Restores:
    """Records what tiers report, and what the engine counts."""

    tokens: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def __call__(self, tier: str, num_bytes: int, seconds: float, failed: bool) -> None:
        if failed:
            self.failed.append(tier)

    def reuse(self, reuse: Reuse) -> None:
        if reuse.tier != MEMORY:
            self.tokens[reuse.tier] = self.tokens.get(reuse.tier, 0) + reuse.tokens


@dataclass
class KVStage:
    engine: Engine
    restores: Restores
    estimate: FetchEstimate
    writer: KVWriter | None

    def reserve(self, id_: str, tokens: Sequence[int], more: int = 64, **fields: Any) -> ReservedRow:
        """Asks again until nothing more is on its way."""
        row = ReserveRow(id_, 0, len(tokens) + more, packed(chain_of(tokens[:-1])), **fields)
        while True:
            (answer,) = self.engine.reserve([row], source="gateway")
            if not answer.restoring:
                return answer

    def converse(self, id_: str, tokens: Sequence[int], new_tokens: int = 4, **fields: Any) -> tuple[int, list[int]]:
        """Reserves, computes, draws. Returns how much was held, and the tokens drawn. The sequence stays."""
        answer = self.reserve(id_, tokens, **fields)
        assert answer.status is Status.OK
        return answer.held, generate([self.engine], id_, tokens, new_tokens, chunk=64, held=answer.held)

    def end(self, id_: str, tokens: Sequence[int]) -> None:
        """tokens: the whole conversation."""
        self.engine.release([ReleaseRow(id_, 0, packed(chain_of(tokens[:-1])))], source="gateway")


def native_stage(dtype: str, *, with_peers: bool = False, **settings: Any) -> Callable[[int], StageServer]:
    """Makes a stage of the tiny llama in C by its index. with_peers: it may fetch KV from other instances."""

    def make(index: int) -> StageServer:
        def build() -> LayerGroup:
            return native_groups("llama", dtype, CUT[index : index + 1])[0]

        tiers = {"tiers": lambda group: peer_tiers(group, CUT[index][0])} if with_peers else {}
        return StageServer(index, CUT, build, **(tiers | settings))

    return make


def peer_tiers(group: LayerGroup, first_layer: int) -> list[Tier]:
    """The tier of an instance that may ask others."""
    assert isinstance(group.kv, KVBlocks)
    fetcher = Fetcher("peer", group.kv.layout, FetchEstimate(ComputeRate()), ThreadPoolExecutor(4), Restores())
    return [PeerTier(PeerClient(LOOPBACK, FINGERPRINT, first_layer, TOKEN), fetcher)]


def chain_of(tokens: Sequence[int], sharer: str = "") -> Chain:
    return extended((), array("i", tokens), chain_key(FINGERPRINT, sharer))


def text(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(100), k=length)


def drawn_without_tiers(dtype: str, tokens: list[int]) -> list[int]:
    """The six tokens after `tokens`, which a new stage computes from the first to the last."""
    with kv_stage(dtype) as stage:
        held, new_tokens = stage.converse("alone", tokens, 6)
        assert held == 0
    return new_tokens


@contextmanager
def kv_stage(
    dtype: str = "float32",
    store: PayloadStore | None = None,
    sealer: Sealer = SEALER,
    max_bytes: int = 2**30,
    group: LayerGroup | None = None,
) -> Iterator[KVStage]:
    """All layers in one stage, with a tier of peers and, with `store`, a tier of the store, which keeps `max_bytes`.

    group: None: of the tiny llama in C.
    """
    group = group or native_groups("llama", dtype, (LAYERS,))[0]
    assert isinstance(group.kv, KVBlocks)
    restores, estimate = Restores(), FetchEstimate(ComputeRate())
    with ThreadPoolExecutor(4) as threads:
        token_seconds = group.kv.token_seconds if isinstance(group.kv, SleepKV) else 0.0
        peers = PeerClient(LOOPBACK, FINGERPRINT, LAYERS[0], TOKEN, token_seconds=token_seconds)
        tiers: list[Any] = [PeerTier(peers, Fetcher("peer", group.kv.layout, estimate, threads, restores))]
        writer = None
        if store is not None:
            kept = KVObjects(store, sealer, "kv", FINGERPRINT, LAYERS)
            tiers.append(StoreTier(kept, Fetcher("store", group.kv.layout, estimate, threads, restores)))
            writer = KVWriter(kept, group.kv, Retention(max_bytes, ONE_WEEK), 2**30, lambda _: None)
        evicted = None if writer is None else writer.evicted
        with engines([group], tiers=tiers, on_evicted=evicted, on_reuse=restores.reuse) as (engine,):
            yield KVStage(engine, restores, estimate, writer)
        peers.close()
