"""Builds the tiers of a stage from its configuration."""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final

from eventing.http.pod_network import PodNetwork
from eventing.http.pod_tls import PodTLS
from functions.configuration.config import StageConfig
from functions.stage.engine.kv_tiers import ComputeRate, Tier
from functions.stage.kv.fetching import Fetcher, FetchEstimate, Observe
from functions.stage.kv.peer_tier import PeerClient, PeerTier
from functions.stage.kv.store_tier import KVWriter, StoreTier, Written
from functions.stage.models.kv_cache import KVBlocks, KVBudget
from functions.stage.models.sleep_group import SleepKV
from functions.threads.pool import ThreadPool
from storage.kv.kv_store import KVObjects, Retention
from storage.kv.sealed import Sealer
from storage.store.payload_store import PayloadStore
from storage.store.settings import StoreSettings

_THREADS: Final = 16  # each fetches one part at a time; shared by all sequences and tiers
_RETRY_SECONDS: Final = 2.0  # how long a request to the store is retried; afterwards computing is faster


@dataclass(frozen=True, slots=True)
class Tiers:
    """The tiers of a stage, and the writer that puts KV into the store."""

    tiers: tuple[Tier, ...] = ()  # the fastest first; they are asked in this order
    writer: KVWriter | None = None  # None if no store for KV is configured


def tiers_of(
    config: StageConfig, kv: KVBudget, rate: ComputeRate, observe: Observe, written: Written, tls: PodTLS | None = None
) -> Tiers:
    """Builds the tiers that the configuration names.

    There are none if `kv` is not a `KVBlocks`, because the bytes of such a cache cannot be read. rate: speed of this stage's
    prefill; KV is fetched only if that is expected to be faster. observe: called after each restore. written: called after each
    part of KV that was written to the store. tls: given if peers are reached over https.
    """
    if not isinstance(kv, KVBlocks):
        return Tiers()
    threads = ThreadPool(_THREADS, "kv-part")

    def fetcher(tier: str) -> Fetcher:
        return Fetcher(tier, kv.layout, FetchEstimate(rate), threads, observe)

    pods = PodNetwork(config.pod_network, config.pod_port, secure=tls is not None)
    token_seconds = kv.token_seconds if isinstance(kv, SleepKV) else 0.0
    peers = PeerClient(pods, config.pipeline, config.layers[0], config.pipeline_token, tls, token_seconds)
    peer_tier = PeerTier(peers, fetcher(PeerTier.name))
    own = config.kv_store
    if own.place is None or own.key is None:
        return Tiers((peer_tier,))
    bucket, prefix = own.place
    payloads = PayloadStore(_store_settings(config, bucket), stall_seconds=_RETRY_SECONDS, retry_seconds=_RETRY_SECONDS)
    store = KVObjects(payloads, Sealer(own.key), prefix, config.pipeline, config.layers)
    retention = Retention(own.max_bytes, timedelta(seconds=own.max_age_seconds))
    writer = KVWriter(store, kv, retention, own.bytes_per_second, written)
    return Tiers((peer_tier, StoreTier(store, fetcher(StoreTier.name))), writer)


def _store_settings(config: StageConfig, bucket: str) -> StoreSettings:
    """Returns the settings of the KV store. A setting that the KV store lacks is that of the models' store."""
    own, models = config.kv_store, config.store
    settings = replace(models, bucket=bucket, endpoint_url=own.endpoint_url or models.endpoint_url)
    if own.access_key_id is None:
        return settings
    return replace(
        settings,
        access_key_id=own.access_key_id,
        secret_access_key=own.secret_access_key,
        session_token=None,
        web_identity_token_file=None,
    )
