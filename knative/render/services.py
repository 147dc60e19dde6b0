"""A resolved pipeline → Kubernetes objects: a Knative Service per stage, one for the gateway, its Role.

They are what runs everywhere: on a cluster as they are, on one machine read by `knative/local`. Keys of the environment are
those of docs/reference.md. No secret value is ever rendered, only names of Secrets.
"""

import math
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import msgspec

from knative.render.resolved_pipeline import ResolvedPipeline, labels
from knative.spec.cut import format_cut
from knative.spec.errors import SpecError
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.pipeline_spec import Autoscaling, PipelineSpec, Resources, Stage, quantity
from knative.spec.pod import Pod
from knative.spec.tracing import Tracing
from knative.spec.web_identity import WebIdentity

T = TypeVar("T")
CONTAINER_PORT: Final = 8080
METRICS_PORT: Final = 9464
"""Where a function's metrics are by default; a test holds the two together."""
_AUTOSCALING: Final = "autoscaling.knative.dev/"
_CACHE_VOLUME: Final = "weights-cache"
_CACHE_SHARE: Final = 0.95
_OTHER_FILES_BYTES: Final = 2**30
"""Logs and scratch files, which count against the pod's ephemeral storage like its weights cache."""
_TEMPORARY_VOLUME: Final = "tmp"
_TOKEN_VOLUME: Final = "store-token"
_TOKEN_FOLDER: Final = "/var/run/secrets/lamina/store"
_TOKEN_SECONDS: Final = 3600
KEYS_ENTRY: Final = "api-keys"
"""What is read of a Secret of API keys."""
_KEYS_FOLDER: Final = "/var/run/secrets/lamina/api-keys"
_NON_ROOT: Final = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def services(pipeline: ResolvedPipeline) -> list[KubernetesObject]:
    """The Knative Services alone: stages in their order, the gateway and, with Eventing, the events' gateway."""
    stages = [stage_service(pipeline, index) for index in range(len(pipeline.cut))]
    events = [] if pipeline.spec.eventing is None else [events_gateway_service(pipeline)]
    return [*stages, gateway_service(pipeline), *events]


def stage_service(pipeline: ResolvedPipeline, index: int) -> KubernetesObject:
    spec, stage = pipeline.spec, pipeline.stages[index]
    container = _container(spec, stage.resources, _stage_env(pipeline, index), stage.pod)
    if stage.weights_cache is not None:
        # A node short of disk first evicts the pods that use more than they asked for: without this, every one with a cache.
        amount = f"{math.ceil((quantity(stage.weights_cache_size) + _OTHER_FILES_BYTES) / 2**20)}Mi"
        for amounts in container["resources"].values():
            amounts["ephemeral-storage"] = amount
    template = _template(stage.autoscaling, container, stage.timeout_seconds, stage.progress_deadline_seconds)
    # A stage asks nothing of the Kubernetes API. A web identity's token is a volume of its own, which its webhook adds.
    template["spec"]["automountServiceAccountToken"] = False
    if stage.service_account is not None:
        template["spec"]["serviceAccountName"] = stage.service_account
    _add_volumes(template["spec"], stage, spec.store.web_identity)
    return _service(pipeline, pipeline.stage_name(index), "stage", template, stage.pod, cluster_local=True)


def gateway_service(pipeline: ResolvedPipeline) -> KubernetesObject:
    return _gateway(pipeline, pipeline.spec.name, pipeline.spec.gateway.api_keys_secrets, cluster_local=False)


def events_gateway_service(pipeline: ResolvedPipeline) -> KubernetesObject:
    """A gateway for Eventing, which cannot send an API key: it asks for none, and is reached from inside the cluster only."""
    return _gateway(pipeline, pipeline.events_gateway_name, (), cluster_local=True)


def _gateway(pipeline: ResolvedPipeline, name: str, key_secrets: Sequence[str], cluster_local: bool) -> KubernetesObject:
    spec, gateway = pipeline.spec, pipeline.spec.gateway
    scores = "on" if cluster_local else None
    container = _container(spec, gateway.resources, _gateway_env(pipeline, key_secrets, scores), gateway.pod)
    template = _template(gateway.autoscaling, container, gateway.timeout_seconds, 120)
    template["spec"]["serviceAccountName"] = _service_account(spec)
    # Else queue-proxy (Go's ReverseProxy) closes the connection of an answer that begins before the request's body was read to
    # its end: 4 to 19 % of streamed answers broke on a cluster.
    template["metadata"]["annotations"]["features.knative.dev/http-full-duplex"] = "Enabled"
    _add_volumes(template["spec"], None, spec.store.web_identity)
    _mount_keys(template["spec"], key_secrets)
    return _service(pipeline, name, "gateway", template, gateway.pod, cluster_local)


def gateway_access(pipeline: ResolvedPipeline) -> list[KubernetesObject]:
    """ServiceAccount, Role and RoleBinding: the gateway may read EndpointSlices of its namespace, and nothing else."""
    name = _service_account(pipeline.spec)
    metadata = {"name": name, "namespace": pipeline.spec.namespace, "labels": labels(pipeline, "gateway")}
    rule = {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    subject = {"kind": "ServiceAccount", "name": name, "namespace": pipeline.spec.namespace}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": metadata, "rules": [rule]},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": role,
            "subjects": [subject],
        },
    ]


def _service(
    pipeline: ResolvedPipeline, name: str, component: str, template: KubernetesObject, pod: Pod, cluster_local: bool
) -> KubernetesObject:
    own_labels = labels(pipeline, component)
    template["metadata"]["labels"] = {**own_labels, **pod.labels}
    template["metadata"]["annotations"] |= pod.annotations
    template["spec"] |= pod.rendered()
    if cluster_local:
        own_labels["networking.knative.dev/visibility"] = "cluster-local"
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": pipeline.spec.namespace, "labels": own_labels},
        "spec": {"template": template},
    }


def _template(
    scaling: Autoscaling, container: KubernetesObject, timeout_seconds: int, progress_deadline_seconds: int
) -> KubernetesObject:
    annotations = {**_annotations(scaling), "serving.knative.dev/progress-deadline": f"{progress_deadline_seconds}s"}
    return {
        "metadata": {"annotations": annotations},
        "spec": {
            "containerConcurrency": scaling.container_concurrency,
            "timeoutSeconds": timeout_seconds,
            "responseStartTimeoutSeconds": timeout_seconds,  # 300 unless set, whatever timeoutSeconds is
            "enableServiceLinks": False,
            "containers": [container],
        },
    }


def _annotations(scaling: Autoscaling) -> dict[str, str]:
    hpa = scaling.autoscaler_class == "hpa"
    target = scaling.target or (70 if hpa else scaling.default_target)
    values: dict[str, str | None] = {
        "class": f"{scaling.autoscaler_class}.autoscaling.knative.dev",
        "metric": "cpu" if hpa else "concurrency",
        "target": _plain(target),
        "target-utilization-percentage": None if hpa else _plain(scaling.target_utilization_percentage),
        "window": None if hpa else f"{_plain(scaling.window_seconds)}s",
        "panic-window-percentage": None if hpa else _plain(scaling.panic_window_percentage),
        "scale-down-delay": None if hpa else f"{_plain(scaling.scale_down_delay_seconds)}s",
        "min-scale": str(scaling.min_scale),
        "max-scale": str(scaling.max_scale),
        "initial-scale": None if scaling.initial_scale is None else str(scaling.initial_scale),
        "target-burst-capacity": None if scaling.target_burst_capacity is None else _plain(scaling.target_burst_capacity),
    }
    return {_AUTOSCALING + key: value for key, value in values.items() if value is not None}


def _container(spec: PipelineSpec, resources: Resources, env: list[KubernetesObject], pod: Pod) -> KubernetesObject:
    amounts: dict[str, str] = {"cpu": resources.cpu, "memory": resources.memory}
    if resources.gpu:
        amounts["nvidia.com/gpu"] = str(resources.gpu)
    keys = {} if spec.store.secret is None else {"envFrom": [{"secretRef": {"name": spec.store.secret}}]}
    return {
        "name": "user-container",  # Knative's own word; kn renames any other when it applies a manifest again
        "image": spec.image,
        "ports": [{"name": "http1", "containerPort": CONTAINER_PORT}],
        "env": [*env, *_values(**pod.env)],
        **keys,
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        # No period: with one, queue-proxy asks the function once for each question of the kubelet or the activator; without,
        # every 50 ms until it says yes (pkg/queue/readiness/probe.go). Nor may timeoutSeconds be set then.
        "readinessProbe": {"httpGet": {"path": "/readyz"}},
        # /healthz answers while weights still load, so that slow weights never get a pod killed; a minute covers the imports.
        "livenessProbe": {"httpGet": {"path": "/healthz"}, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6},
        "securityContext": {**_NON_ROOT, "capabilities": {"drop": ["ALL"]}},
    }


def _add_volumes(pod: KubernetesObject, stage: Stage | None, identity: WebIdentity | None) -> None:
    """The root file system is read-only: a scratch folder, and the weights cache where it is wanted. And the store's token."""
    volumes: list[KubernetesObject] = [{"name": _TEMPORARY_VOLUME, "emptyDir": {}}]
    mounts: list[KubernetesObject] = [{"name": _TEMPORARY_VOLUME, "mountPath": "/tmp"}]
    if stage is not None and stage.weights_cache is not None:
        volumes.append({"name": _CACHE_VOLUME, "emptyDir": {"sizeLimit": stage.weights_cache_size}})
        mounts.append({"name": _CACHE_VOLUME, "mountPath": stage.weights_cache})
    if identity is not None:
        token = {"audience": identity.audience, "expirationSeconds": _TOKEN_SECONDS, "path": "token"}
        volumes.append({"name": _TOKEN_VOLUME, "projected": {"sources": [{"serviceAccountToken": token}]}})
        mounts.append({"name": _TOKEN_VOLUME, "mountPath": _TOKEN_FOLDER, "readOnly": True})
    pod["containers"][0]["volumeMounts"] = mounts
    pod["volumes"] = volumes


def _mount_keys(pod: KubernetesObject, secrets: Sequence[str]) -> None:
    """As files, which the kubelet writes anew when a Secret changes, and the gateway reads again."""
    for number, secret in enumerate(secrets):
        items = [{"key": KEYS_ENTRY, "path": KEYS_ENTRY}]
        volume = f"{KEYS_ENTRY}-{number}"
        pod["volumes"].append({"name": volume, "secret": {"secretName": secret, "items": items}})
        mount = {"name": volume, "mountPath": f"{_KEYS_FOLDER}/{secret}", "readOnly": True}
        pod["containers"][0]["volumeMounts"].append(mount)


def _common_env(pipeline: ResolvedPipeline, role: str, dtype: str) -> list[KubernetesObject]:
    """dtype: of the publication that it reads."""
    spec, weights = pipeline.spec, pipeline.weights
    mixed = len(set(weights)) > 1 or weights[0][0] != spec.model.dtype
    return [
        *_values(
            LAMINA_ROLE=role,
            LAMINA_PIPELINE=pipeline.fingerprint,
            LAMINA_MODEL=spec.model.name,
            LAMINA_DTYPE=dtype,
            LAMINA_CUT=format_cut(pipeline.cut),
            LAMINA_WEIGHTS=",".join(f"{kind}={digest}" for kind, digest in weights) if mixed else None,
            LAMINA_WIRE_DTYPE=spec.wire_dtype,
            LAMINA_STORE_ENDPOINT=spec.store.endpoint,
            LAMINA_STORE_BUCKET=spec.store.bucket,
            LAMINA_STORE_REGION=spec.store.region,
            LAMINA_POD_NETWORK=spec.gateway.pod_network,
            LAMINA_POD_PORT=spec.gateway.pod_port,
            LAMINA_LOG_LEVEL=spec.log_level,
        ),
        *_identity_env(spec.store.web_identity),
        *_tracing_env(spec.tracing),
        _from_secret("LAMINA_PIPELINE_TOKEN", spec.token_secret, "token"),
    ]


def _identity_env(identity: WebIdentity | None) -> list[KubernetesObject]:
    if identity is None:
        return []
    return _values(
        AWS_WEB_IDENTITY_TOKEN_FILE=f"{_TOKEN_FOLDER}/token",
        AWS_ROLE_ARN=identity.role_arn,
        AWS_ENDPOINT_URL_STS=identity.sts_endpoint,
    )


def _tracing_env(tracing: Tracing | None) -> list[KubernetesObject]:
    if tracing is None:
        return []
    return _values(
        OTEL_EXPORTER_OTLP_ENDPOINT=tracing.endpoint,
        OTEL_TRACES_SAMPLER="parentbased_traceidratio",
        OTEL_TRACES_SAMPLER_ARG=tracing.sample_ratio,
    )


def _stage_env(pipeline: ResolvedPipeline, index: int) -> list[KubernetesObject]:
    stage = pipeline.stages[index]
    first, last = pipeline.cut[index]
    return [
        *_common_env(pipeline, "stage", pipeline.weights[index][0]),
        # There while one is rotated: knative/cluster/rotation.py.
        _from_secret("LAMINA_SECOND_PIPELINE_TOKEN", pipeline.spec.token_secret, "second", optional=True),
        *_values(
            LAMINA_LAYERS=f"{first}:{last}",
            LAMINA_LAYER_GROUP=stage.layer_group,
            LAMINA_SLEEP_SECONDS=_of_stage(stage.sleep_seconds, index, "sleep_seconds"),
            **_emulated_device(stage, index),
            LAMINA_DEVICE=stage.device,
            LAMINA_THREADS=stage.threads,
            LAMINA_BUSY_THREADS=stage.busy_threads,
            LAMINA_KV_CACHE_BYTES=int(quantity(stage.kv_cache)),
            LAMINA_MAX_MERGE=stage.max_merge,
            LAMINA_MOST_AWAITING_ROOM=_most_awaiting_room(stage.autoscaling.container_concurrency),
            LAMINA_IDLE_SEQUENCE_SECONDS=stage.idle_sequence_seconds,
            LAMINA_WEIGHTS_CACHE=stage.weights_cache,
            LAMINA_WEIGHTS_CACHE_BYTES=_cache_bytes(stage) if stage.weights_cache else None,
        ),
        *_kv_store_env(pipeline, index),
    ]


def _most_awaiting_room(container_concurrency: int) -> int | None:
    """Two places are left for those who compute. None: as many as usual, 0 is without a limit."""
    return max(0, container_concurrency - 2) if 0 < container_concurrency < 4 else None


def _kv_store_env(pipeline: ResolvedPipeline, index: int) -> list[KubernetesObject]:
    """Each stage gets its share of the bytes, by its layers."""
    spec, kept = pipeline.spec, pipeline.spec.kv_store
    if kept is None:
        return []
    first, last = pipeline.cut[index]
    return [
        *_values(
            LAMINA_KV_STORE=f"{kept.bucket or spec.store.bucket}/{kept.prefix}",
            LAMINA_KV_STORE_ENDPOINT=kept.endpoint,
            LAMINA_KV_STORE_BYTES=int(quantity(kept.max_bytes) * (last - first) / pipeline.cut[-1][1]),
            LAMINA_KV_STORE_AGE_SECONDS=kept.max_age_seconds,
            LAMINA_KV_STORE_BYTES_PER_SECOND=None if kept.write_rate is None else int(quantity(kept.write_rate)),
        ),
        _from_secret("LAMINA_KV_KEY", kept.secret, "key"),
        _from_secret("LAMINA_KV_STORE_ACCESS_KEY_ID", kept.secret, "AWS_ACCESS_KEY_ID", optional=True),
        _from_secret("LAMINA_KV_STORE_SECRET_ACCESS_KEY", kept.secret, "AWS_SECRET_ACCESS_KEY", optional=True),
    ]


def _cache_bytes(stage: Stage) -> int:
    """Less than the volume's limit: the kubelet counts blocks and folders as well, and evicts the pod of a volume beyond it."""
    return int(quantity(stage.weights_cache_size) * _CACHE_SHARE)


def _emulated_device(stage: Stage, index: int) -> dict[str, Any]:
    """Nothing of stages that compute, whose pods would refuse to start with it. Raises SpecError."""
    given = {name: getattr(stage, name) for name in ("sleep_pass_times", "sleep_bytes_per_second")}
    named = [name for name, value in given.items() if value is not None]
    if named and stage.layer_group != "sleep":
        raise SpecError(f"$.stage.{named[0]}: emulates a device, and $.stage.layer_group is {stage.layer_group}, not sleep")
    times = _of_stage(stage.sleep_pass_times, index, "sleep_pass_times")
    return {
        "LAMINA_SLEEP_PASS_TIMES": None if times is None else msgspec.json.encode(times).decode(),
        "LAMINA_SLEEP_BYTES_PER_SECOND": stage.sleep_bytes_per_second,
    }


def _of_stage(value: T | list[T] | None, index: int, name: str) -> T | None:
    """Raises SpecError."""
    if not isinstance(value, list):
        return value
    if index >= len(value):
        raise SpecError(f"$.stage.{name}: {len(value)} given, none for stage {index}")
    return value[index]


def _gateway_env(pipeline: ResolvedPipeline, key_secrets: Sequence[str], scores: str | None) -> list[KubernetesObject]:
    gateway = pipeline.spec.gateway
    stages = ",".join(f"{first}:{last}={pipeline.stage_url(k)}" for k, (first, last) in enumerate(pipeline.cut))
    env = [
        *_common_env(pipeline, "gateway", pipeline.spec.model.dtype),
        *_values(
            LAMINA_STAGES=stages,
            LAMINA_STAGE_SERVICES=",".join(pipeline.stage_names),
            LAMINA_STAGE_TARGETS=",".join(_plain(stage.autoscaling.target_concurrency) for stage in pipeline.stages),
            LAMINA_PAGE="off" if scores else gateway.page,  # nobody opens the events' gateway in a browser
            LAMINA_QUEUE_LIMIT=gateway.queue_limit,
            LAMINA_CHUNK_TOKENS=gateway.chunk_tokens,
            LAMINA_MICRO_BATCH_SEQUENCES=gateway.micro_batch_sequences,
            LAMINA_DRAFT_TOKENS=gateway.draft_tokens,
            LAMINA_PREFIX_SHARING=gateway.prefix_sharing,
            LAMINA_TOOL_PARSER=gateway.tool_parser,
            LAMINA_STAGES_AT_ONCE=gateway.stages_at_once,
            LAMINA_COLD_START_TIMEOUT_SECONDS=gateway.cold_start_timeout_seconds,
            LAMINA_REQUEST_TIMEOUT_SECONDS=gateway.request_timeout_seconds,
            LAMINA_STEP_TIMEOUT_SECONDS=gateway.step_timeout_seconds,
            LAMINA_KUBERNETES_API="cluster",
            LAMINA_NAMESPACE=pipeline.spec.namespace,
            LAMINA_ACCESS_LOG=gateway.access_log,
            LAMINA_CLIENT_REQUESTS_PER_MINUTE=gateway.client_requests_per_minute,
            LAMINA_CLIENT_TOKENS_PER_MINUTE=gateway.client_tokens_per_minute,
            LAMINA_CLIENT_CONCURRENT=gateway.client_concurrent,
            LAMINA_CLIENT_MAX_TOKENS=gateway.client_max_tokens,
            LAMINA_CORS_ORIGINS=",".join(gateway.cors_origins) if gateway.cors_origins else None,
            LAMINA_API_KEY_FILES=",".join(f"{_KEYS_FOLDER}/{secret}/{KEYS_ENTRY}" for secret in key_secrets) or None,
            LAMINA_PROXIES=gateway.proxies,
            LAMINA_SCORES=scores,
        ),
    ]
    if gateway.limits_secret is not None:
        env.append(_from_secret("LAMINA_LIMITS_STORE", gateway.limits_secret, "url"))
    return env


def _values(**values: object) -> list[KubernetesObject]:
    """Settings left out are not rendered: the function's own default applies."""
    return [{"name": name, "value": _plain(value)} for name, value in values.items() if value is not None]


def _from_secret(name: str, secret: str, key: str, *, optional: bool = False) -> KubernetesObject:
    reference: KubernetesObject = {"name": secret, "key": key, **({"optional": True} if optional else {})}
    return {"name": name, "valueFrom": {"secretKeyRef": reference}}


def _plain(value: object) -> str:
    """2.0 → 2: Kubernetes and Knative read both, people prefer the shorter."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _service_account(spec: PipelineSpec) -> str:
    return spec.gateway.service_account or f"{spec.name}-gateway"
