"""The tiers of a stage, as its configuration has them."""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final

from eventing.http.pod_network import PodNetwork
from functions.configuration.config import StageConfig
from functions.stage.engine.reuse import ComputeRate
from functions.stage.engine.tiers import Tier
from functions.stage.kv.fetching import Fetcher, Observe
from functions.stage.kv.keeping import Keeping, Written
from functions.stage.kv.peer_tier import PeerClient, PeerTier
from functions.stage.kv.store_tier import StoreTier
from functions.stage.kv.worth import Worth
from functions.stage.models.kv_ranges import KVRanges
from functions.stage.models.layer_group import KVCache
from functions.threads.pool import ThreadPool
from storage.kv.kv_store import KVObjects, Retention
from storage.kv.sealed import Sealer
from storage.store.payload_store import PayloadStore
from storage.store.settings import StoreSettings

_THREADS: Final = 16
"""That wait for parts, of all sequences and tiers together."""
_RETRY_SECONDS: Final = 2.0
"""Of the store: what it does not give soon is computed sooner."""


@dataclass(frozen=True, slots=True)
class Tiers:
    """Behind the memory of a stage, the nearest first."""

    tiers: tuple[Tier, ...] = ()
    keeping: Keeping | None = None
    """Where there is a store to keep in."""


def tiers_of(config: StageConfig, kv: KVCache, rate: ComputeRate, observe: Observe, written: Written) -> Tiers:
    """None for a cache whose bytes cannot be read."""
    if not isinstance(kv, KVRanges):
        return Tiers()
    threads = ThreadPool(_THREADS, "kv-part")

    def fetcher(tier: str) -> Fetcher:
        return Fetcher(tier, kv.layout, Worth(rate), threads, observe)

    peers = PeerClient(
        PodNetwork(config.pod_network, config.pod_port), config.pipeline, config.layers[0], config.pipeline_token
    )
    peer_tier = PeerTier(peers, fetcher(PeerTier.name))
    kept = _kept(config)
    if kept is None:
        return Tiers((peer_tier,))
    retention = Retention(config.kv_store.max_bytes, timedelta(seconds=config.kv_store.max_age_seconds))
    keeping = Keeping(kept, kv, retention, config.kv_store.bytes_per_second, written)
    return Tiers((peer_tier, StoreTier(kept, fetcher(StoreTier.name))), keeping)


def _kept(config: StageConfig) -> KVObjects | None:
    own = config.kv_store
    if own.place is None or own.key is None:
        return None
    bucket, prefix = own.place
    store = PayloadStore(_settings(config, bucket), stall_seconds=_RETRY_SECONDS, retry_seconds=_RETRY_SECONDS)
    return KVObjects(store, Sealer(own.key), prefix, config.pipeline, config.layers)


def _settings(config: StageConfig, bucket: str) -> StoreSettings:
    """The models' store, but for what is said of this one."""
    own, models = config.kv_store, config.store
    there = replace(models, bucket=bucket, endpoint_url=own.endpoint_url or models.endpoint_url)
    if own.access_key_id is None:
        return there
    return replace(
        there,
        access_key_id=own.access_key_id,
        secret_access_key=own.secret_access_key,
        session_token=None,
        web_identity_token_file=None,
    )
