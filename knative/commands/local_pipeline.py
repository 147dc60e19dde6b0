"""The pipeline that `run` serves: a model in the embedded store, a spec for this machine, and its secrets."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import msgspec
from rich.console import Console

from functions.configuration.api_keys import HASHED
from functions.stage.engine.threads import usable_cores
from functions.stage.models.checkpoints import STATES_PER_SEQUENCE
from knative.commands.console import publish_progress, show_quantized
from knative.commands.model_choice import DEFAULT_MODEL, best_dtype, packaged_model, published_name
from knative.commands.state_folder import replace_file
from knative.local.kubelet.containers import NamedData
from knative.render.rendering import resolve
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.spec.cut import cut_evenly
from knative.spec.model_shape import ModelShape, published_shape
from knative.spec.pipeline_spec import (
    KEYS_ENTRY,
    Autoscaling,
    GatewaySpec,
    KVStoreSpec,
    ModelSpec,
    PipelineSpec,
    Resources,
    StageSpec,
    StoreSpec,
)
from knative.spec.sizing import StagePlan, plan_stages
from storage.checkpoints.model_source import locate, open_checkpoint
from storage.errors import ModelNotPublished
from storage.kv.sealed import KEY_BYTES
from storage.models.model_repository import ModelManifest, list_models, read_manifest
from storage.models.publisher import publish
from storage.store.object_store import ObjectStore

_RUNTIME_BYTES: Final = 2**30  # Python, torch and what a forward pass needs besides weights and KV
_KV_BYTES: Final = 2**28
_RECURRENT_SEQUENCES: Final = 8  # whose recurrent states have room beside _KV_BYTES
_WEIGHTS_CACHE: Final = "8Gi"  # limit of the folder with verified weights; all models share it
_KV_KEY_FILE: Final = "kv-key"
_KV_SECRET: Final = "lamina-kv"
_MAX_SCALE: Final = 3  # more replicas of a stage do not add cores to this machine


@dataclass(frozen=True, slots=True)
class LocalPipeline:
    pipeline: ResolvedPipeline
    manifest: ModelManifest
    shape: ModelShape
    secrets: NamedData

    @property
    def api_key(self) -> str | None:
        """An API key that the gateway accepts; None if it needs none, or if only hashes of keys are known."""
        for name in self.pipeline.spec.gateway.api_keys_secrets:
            for part in self.secrets[name][KEYS_ENTRY].replace("\n", ",").split(","):
                if part.strip() and not part.lstrip().startswith(("#", HASHED)):
                    return part.split()[0]
        return None


@dataclass(frozen=True, slots=True)
class Sharing:
    """Settings for stages that share the cores of one machine. stages: how many. docs/log.md has the measurements."""

    cores: int
    stages: int

    # Fewer and larger micro-batches than on a cluster, because each forward pass reads all weights through the same memory.
    micro_batch_sequences: ClassVar[int] = 16

    @property
    def busy_threads(self) -> int:
        return max(1, self.cores // self.stages)

    @property
    def stages_at_once(self) -> int:
        """How many stages may compute at the same time.

        Each gets at least two cores: stages that take turns with two cores are faster than stages side by side with fewer.
        """
        return max(1, min(self.stages, self.cores // 2))


def ensure_published(
    store: ObjectStore, model: str | None, dtype: str | None, console: Console, tokenizer: Path | None = None
) -> ModelManifest:
    """Publishes the model unless the store has it, and returns its manifest. Raises a StorageError.

    model: a published name, or a source as for `push`; None or DEFAULT_MODEL: the packaged model. dtype: None: what
    `best_dtype` says; for a published name the smallest dtype in which it is published. tokenizer: as for `publish`.
    """
    from functions.stage.models.build import check_cut

    source: str | Path
    if model in (None, DEFAULT_MODEL):
        name, source = DEFAULT_MODEL, packaged_model()
    elif Path(model).exists() or "/" in model:
        name, source = published_name(model), model
    else:
        return _already_published(store, model, dtype or _smallest_published(store, model))
    if dtype is None:
        source = locate(source)
        dtype = best_dtype(open_checkpoint(source, tokenizer))
    with publish_progress(console, f"publishing {name} as {dtype}") as progress:
        shown = show_quantized(console, dtype)
        return publish(
            source, store, name, dtype, progress=progress, on_quantized=shown, tokenizer=tokenizer, check_cut=check_cut
        )


def local_pipeline(
    store: ObjectStore,
    manifest: ModelManifest,
    stages: int,
    spec: PipelineSpec | None,
    named_secrets: NamedData,
    weights_cache: Path | None = None,
    kv_key: str | None = None,
) -> LocalPipeline:
    """Resolves the pipeline of `spec` or, if that is None, of a spec made for this machine with this number of stages.

    named_secrets: Secrets by name; those that it lacks are generated. weights_cache: folder for verified weights, if there is
    no spec. kv_key: encrypts idle conversations in the store; None: a new key, and without a spec no such store. Raises
    TooManyStages, RenderFailed or SpecError.
    """
    replace = msgspec.structs.replace
    shape = published_shape(store, manifest)
    here, store_keys = as_in_specs(store)
    if spec is None:
        spec = _spec_for_this_machine(manifest, shape, stages, here)
        if weights_cache is not None:
            cache = str(weights_cache.resolve())
            spec = replace(spec, stage=replace(spec.stage, weights_cache=cache, weights_cache_size=_WEIGHTS_CACHE))
        if kv_key is not None:
            spec = replace(spec, kv_store=KVStoreSpec(secret=_KV_SECRET))
    else:
        spec = replace(spec, store=replace(here, secret=spec.store.secret or here.secret))
        if spec.kv_store is not None:
            spec = replace(spec, kv_store=replace(spec.kv_store, endpoint=None, bucket=None))
    generated = {
        str(spec.store.secret): store_keys,
        spec.token_secret: {"token": secrets.token_hex(16)},
        **{name: {KEYS_ENTRY: secrets.token_hex(16)} for name in spec.gateway.api_keys_secrets},
    }
    if spec.kv_store is not None:
        generated[spec.kv_store.secret] = {"key": kv_key or secrets.token_hex(KEY_BYTES)}
    found: dict[str, tuple[ModelManifest, ModelShape]] = {manifest.dtype: (manifest, shape)}

    def published(dtype: str) -> tuple[ModelManifest, ModelShape]:
        if dtype not in found:
            other = _already_published(store, manifest.name, dtype)
            found[dtype] = (other, published_shape(store, other))
        return found[dtype]

    return LocalPipeline(resolve(spec, published), manifest, shape, {**generated, **named_secrets})


def as_in_specs(store: ObjectStore) -> tuple[StoreSpec, dict[str, str]]:
    """A store as a spec names it, and the contents of the Secret with its keys."""
    settings = store.settings
    keys = {"AWS_ACCESS_KEY_ID": settings.access_key_id or "", "AWS_SECRET_ACCESS_KEY": settings.secret_access_key or ""}
    return StoreSpec(endpoint=settings.endpoint_url, bucket=settings.bucket, region=settings.region), keys


def kept_kv_key(state: Path) -> str:
    """The key that encrypts KV of idle conversations in the store. It is made once and kept in the state folder.

    So a later run can read the conversations of an earlier one.
    """
    file = state / _KV_KEY_FILE
    kept = file.read_text(encoding="ascii").strip() if file.exists() else ""
    if not kept:
        kept = secrets.token_hex(KEY_BYTES)
        replace_file(file, kept.encode())
    return kept


def _smallest_published(store: ObjectStore, name: str) -> str:
    published = [dtype for model, dtype in list_models(store) if model == name]
    return next((dtype for dtype in ("q4", "kept", "int8", "bfloat16", "float16", "float32") if dtype in published), "bfloat16")


def _already_published(store: ObjectStore, name: str, dtype: str) -> ModelManifest:
    try:
        return read_manifest(store, name, dtype)
    except ModelNotPublished as error:
        known = ", ".join(f"{model} as {kind}" for model, kind in list_models(store)) or "nothing"
        raise ModelNotPublished(f"{name!r} is no folder here, and not published as {dtype}; published: {known}") from error


def kv_cache_bytes(plans: Sequence[StagePlan]) -> int:
    """`kv_cache` of the stages on one machine, with room for the recurrent states of eight sequences in the largest of them."""
    states = max(plan.state_bytes for plan in plans) * STATES_PER_SEQUENCE * _RECURRENT_SEQUENCES
    return _KV_BYTES + states * 4 // 3  # a quarter is for checkpoints


def _spec_for_this_machine(manifest: ModelManifest, shape: ModelShape, stages: int, store: StoreSpec) -> PipelineSpec:
    plans = plan_stages(shape, cut_evenly(shape, stages))
    kv_bytes = kv_cache_bytes(plans)
    memory = max(plan.weight_bytes for plan in plans) * 2 + kv_bytes + _RUNTIME_BYTES
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
            kv_cache=f"{math.ceil(kv_bytes / 2**20)}Mi",
            autoscaling=Autoscaling(max_scale=_MAX_SCALE),
        ),
        gateway=GatewaySpec(
            micro_batch_sequences=sharing.micro_batch_sequences,
            stages_at_once=sharing.stages_at_once,
            prefix_sharing="pipeline",  # all clients of this machine are its user
            jobs="jobs",
        ),
        store=store,
    )
