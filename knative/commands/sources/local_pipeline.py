"""What `run` runs: a model in the embedded store, the pipeline made of it, and the platform's options for this machine."""

import math
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import msgspec
from rich.console import Console

from functions.configuration.api_keys import HASHED
from functions.stage.engine.threads import usable_cores
from knative.commands.sources.model_fit import best_dtype
from knative.commands.terminal.console import publish_progress
from knative.local.kubelet.containers import NamedData
from knative.render.rendering import resolve
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import KEYS_ENTRY
from knative.spec.cut import cut_evenly
from knative.spec.model_shape import ModelShape, published_shape
from knative.spec.model_sources import DEFAULT_MODEL, packaged_model, published_name
from knative.spec.pipeline_spec import (
    Autoscaling,
    GatewaySpec,
    KVStoreSpec,
    ModelSpec,
    PipelineSpec,
    Resources,
    StageSpec,
    StoreSpec,
    quantity,
)
from knative.spec.sizing import plan_stages
from storage.checkpoints.model_source import locate, open_checkpoint
from storage.errors import ModelNotPublished
from storage.kv.sealed import KEY_BYTES
from storage.models.model_repository import ModelManifest, list_models, read_manifest
from storage.models.publisher import publish
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings

_RUNTIME_BYTES: Final = 2**30
"""Python, torch and what a pass needs beside weights and KV."""
_KV_CACHE: Final = "256Mi"
_CACHE: Final = "8Gi"
"""Of verified weights, of all models that were run here lately."""
_KV_KEY_FILE: Final = "kv-key"
_KV_SECRET: Final = "lamina-kv"
_MAX_SCALE: Final = 3
"""Of a stage on one machine, whose cores more replicas do not multiply."""


@dataclass(frozen=True, slots=True)
class LocalPipeline:
    pipeline: ResolvedPipeline
    manifest: ModelManifest
    shape: ModelShape
    secrets: NamedData

    @property
    def has_chat_template(self) -> bool:
        return "chat_template.jinja" in self.manifest.files

    @property
    def api_key(self) -> str | None:
        """One that the gateway takes; None where it is open."""
        for name in self.pipeline.spec.gateway.api_keys_secrets:
            for part in self.secrets[name][KEYS_ENTRY].replace("\n", ",").split(","):
                if part.strip() and not part.lstrip().startswith(("#", HASHED)):
                    return part.split()[0]
        return None


@dataclass(frozen=True, slots=True)
class Sharing:
    """How `stages` share the `cores` of one machine. docs/log.md has what was measured."""

    cores: int
    stages: int

    micro_batch_sequences: ClassVar[int] = 16
    """Fewer and larger than on a cluster, because each pass reads all weights through the same memory."""

    @property
    def busy_threads(self) -> int:
        return max(1, self.cores // self.stages)

    @property
    def stages_at_once(self) -> int:
        """With less than two cores for each, one after the other with both is quicker than side by side."""
        return max(1, min(self.stages, self.cores // 2))


def ensure_published(store: ObjectStore, model: str | None, dtype: str | None, console: Console) -> ModelManifest:
    """model: None or its name for the default one, a published name, or what `push` takes. Publishes only what is not there.

    dtype: None for the one that suits the checkpoint; of a published name, for the smallest that there is.

    Raises a StorageError.
    """
    source: str | Path
    if model in (None, DEFAULT_MODEL):
        name, source = DEFAULT_MODEL, packaged_model()
    elif Path(model).exists() or "/" in model:
        name, source = published_name(model), model
    else:
        return _already_published(store, model, dtype or _smallest_published(store, model))
    if dtype is None:
        source = locate(source)
        dtype = best_dtype(open_checkpoint(source))
    with publish_progress(console, f"publishing {name} as {dtype}") as progress:
        return publish(source, store, name, dtype, progress=progress)


def local_pipeline(
    store: ObjectStore,
    manifest: ModelManifest,
    stages: int,
    spec: PipelineSpec | None,
    named_secrets: NamedData,
    weights_cache: Path | None = None,
    kv_key: str | None = None,
) -> LocalPipeline:
    """spec: None for one made for this machine, whose stages keep verified weights in the folder `weights_cache`, and idle
    conversations in the store, encrypted with `kv_key`.

    Secrets that are not given are made up for this run. Raises TooManyStages, RenderFailed or SpecError.
    """
    shape = published_shape(store, manifest)
    here = StoreSpec(endpoint=store.settings.endpoint_url, bucket=store.settings.bucket, region=store.settings.region)
    if spec is None:
        spec = _spec_for_this_machine(manifest, shape, stages, here)
        if weights_cache is not None:
            stage = msgspec.structs.replace(spec.stage, weights_cache=str(weights_cache.resolve()), weights_cache_size=_CACHE)
            spec = msgspec.structs.replace(spec, stage=stage)
        if kv_key is not None:
            spec = msgspec.structs.replace(spec, kv_store=KVStoreSpec(secret=_KV_SECRET))
    else:
        spec = msgspec.structs.replace(spec, store=msgspec.structs.replace(here, secret=spec.store.secret or here.secret))
        if spec.kv_store is not None:
            spec = msgspec.structs.replace(spec, kv_store=msgspec.structs.replace(spec.kv_store, endpoint=None, bucket=None))
    made = {str(spec.store.secret): _store_secret(store.settings), spec.token_secret: {"token": secrets.token_hex(16)}}
    made |= {name: {KEYS_ENTRY: secrets.token_hex(16)} for name in spec.gateway.api_keys_secrets}
    if spec.kv_store is not None:
        made[spec.kv_store.secret] = {"key": kv_key or secrets.token_hex(KEY_BYTES)}
    found: dict[str, tuple[ModelManifest, ModelShape]] = {manifest.dtype: (manifest, shape)}

    def published(dtype: str) -> tuple[ModelManifest, ModelShape]:
        if dtype not in found:
            other = _already_published(store, manifest.name, dtype)
            found[dtype] = (other, published_shape(store, other))
        return found[dtype]

    return LocalPipeline(resolve(spec, published), manifest, shape, {**made, **named_secrets})


def kept_kv_key(state: Path) -> str:
    """Of this state folder, made when it is first asked for: what an earlier run kept can be read by a later one."""
    file = state / _KV_KEY_FILE
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(secrets.token_hex(KEY_BYTES), encoding="ascii")
    return file.read_text(encoding="ascii").strip()


def _smallest_published(store: ObjectStore, name: str) -> str:
    published = [dtype for model, dtype in list_models(store) if model == name]
    return next((dtype for dtype in ("q4", "int8", "bfloat16", "float16", "float32") if dtype in published), "bfloat16")


def _already_published(store: ObjectStore, name: str, dtype: str) -> ModelManifest:
    try:
        return read_manifest(store, name, dtype)
    except ModelNotPublished as error:
        known = ", ".join(f"{model} as {kind}" for model, kind in list_models(store)) or "nothing"
        raise ModelNotPublished(f"{name!r} is no folder here, and not published as {dtype}; published is {known}") from error


def _spec_for_this_machine(manifest: ModelManifest, shape: ModelShape, stages: int, store: StoreSpec) -> PipelineSpec:
    plans = plan_stages(shape, cut_evenly(shape, stages))
    memory = max(plan.weight_bytes for plan in plans) * 2 + quantity(_KV_CACHE) + _RUNTIME_BYTES
    cores = usable_cores()
    sharing = Sharing(cores, stages)
    return PipelineSpec(
        name="lamina",
        model=ModelSpec(name=manifest.name, dtype=manifest.dtype),
        stages=stages,
        image="lamina:local",
        stage=StageSpec(
            resources=Resources(cpu=str(cores), memory=f"{math.ceil(memory / 2**20)}Mi"),
            busy_threads=sharing.busy_threads,
            kv_cache=_KV_CACHE,
            autoscaling=Autoscaling(max_scale=_MAX_SCALE),
        ),
        gateway=GatewaySpec(micro_batch_sequences=sharing.micro_batch_sequences, stages_at_once=sharing.stages_at_once),
        store=store,
    )


def _store_secret(settings: StoreSettings) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": settings.access_key_id or "", "AWS_SECRET_ACCESS_KEY": settings.secret_access_key or ""}
