"""Files and batches as the configuration wants them."""

from dataclasses import dataclass, replace

from eventing.claim_check import ClaimCheck
from eventing.http.delivery import Sender
from functions.configuration.config import GatewayConfig
from functions.gateway.jobs.batches import Batches
from functions.gateway.jobs.events import BatchEvents
from functions.gateway.jobs.files import Files, JobObjects
from functions.gateway.jobs.hold import Hold
from storage.store.payload_store import PayloadStore


@dataclass(frozen=True, slots=True)
class Jobs:
    """Files and batches, and the events that begin batches and tell of their ends."""

    batches: Batches
    events: BatchEvents
    hold: Hold


def configured_batches(config: GatewayConfig) -> Batches | None:
    """Batches and their files in the configured store; None: they are not served."""
    if config.jobs_store is None:
        return None
    bucket, prefix = config.jobs_store
    # By model: gateways of other models would answer that they do not serve this one.
    objects = JobObjects(PayloadStore(replace(config.store, bucket=bucket)), f"{prefix}/{config.model}")
    return Batches(objects, Files(objects, config.jobs_retention_seconds))


def configured_jobs(config: GatewayConfig) -> Jobs | None:
    """Files, batches and their events; None: they are not served."""
    batches = configured_batches(config)
    if batches is None:
        return None
    claims = ClaimCheck(PayloadStore(config.store), config.store.bucket)
    sender = Sender()
    events = BatchEvents(batches, claims, sender, f"/pipelines/{config.pipeline}/gateway", config.sink)
    return Jobs(batches, events, Hold(sender, config.own_url))
