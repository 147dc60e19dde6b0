"""Knative Services of a resolved pipeline: one for each stage, one for the gateway, and with Eventing a gateway for events.

A cluster and `knative/local` run the same manifests. Environment keys are those of docs/reference.md. Secrets are only named,
their values are never rendered.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeVar

import msgspec

from functions.configuration.objective import Objective
from knative.render.resolved_pipeline import ResolvedPipeline, cluster_url, labels
from knative.spec.cut import format_cut
from knative.spec.errors import SpecError
from knative.spec.kubernetes_object import KubernetesObject, kubernetes_object
from knative.spec.pipeline_spec import (
    KEYS_ENTRY,
    Autoscaling,
    GatewayResources,
    PipelineSpec,
    PodSpec,
    Resources,
    StageSpec,
    quantity,
)

T = TypeVar("T")
CONTAINER_PORT: Final = 8080
METRICS_PORT: Final = 9464  # the functions' own default; a test compares them
_AUTOSCALING: Final = "autoscaling.knative.dev/"
_CACHE_VOLUME: Final = "weights-cache"
_CACHE_SHARE: Final = 0.95
_OTHER_FILES_BYTES: Final = 2**30  # logs and scratch files, which count as ephemeral storage like the weights cache
_TEMPORARY_VOLUME: Final = "tmp"
_TOKEN_VOLUME: Final = "store-token"
_TOKEN_FOLDER: Final = "/var/run/secrets/lamina/store"
_TOKEN_SECONDS: Final = 3600
KEYS_FOLDER: Final = "/var/run/secrets/lamina/api-keys"
_GATEWAY_PROGRESS_SECONDS: Final = 120
_PROMPT_SHARE: Final = 64 / 512  # of the gateway's memory; a function's default for the default memory
QUEUE_PROXY, QUEUE_PROXY_TLS = 8012, 8112  # queue-proxy's ports for requests (knative/serving pkg/networking/constants.go)
POD_TLS: Final = 8443  # the stage's own port with TLS, if the spec has certificates
SERVING_CERTS: Final = "serving-certs"  # the Secret with queue-proxy's certificate, in each namespace with system-internal-tls
_TLS_VOLUME, _TLS_CA_VOLUME = "tls", "tls-ca"
_TLS_FOLDER, _TLS_CA_FOLDER = "/var/run/secrets/lamina/tls", "/var/run/secrets/lamina/ca"
NON_ROOT: Final = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def services(pipeline: ResolvedPipeline) -> list[KubernetesObject]:
    """The stages in their order, the gateway and, if the spec has `eventing`, the gateway for events."""
    stages = [stage_service(pipeline, index) for index in range(len(pipeline.cut))]
    events = [] if pipeline.spec.eventing is None else [gateway_service(pipeline, for_events=True)]
    return [*stages, gateway_service(pipeline), *events]


def stage_service(pipeline: ResolvedPipeline, index: int) -> KubernetesObject:
    spec, stage = pipeline.spec, pipeline.stages[index]
    container = _container(spec, stage.resources, _stage_env(pipeline, index), stage.pod)
    template = _template(spec, stage.autoscaling, container, stage.timeout_seconds, stage.progress_deadline_seconds)
    pod = template["spec"]
    # Stages do not use the Kubernetes API. A web identity's token is a volume of its own.
    pod["automountServiceAccountToken"] = False
    if stage.service_account is not None:
        pod["serviceAccountName"] = stage.service_account
    if stage.weights_cache is not None:
        pod["volumes"].append({"name": _CACHE_VOLUME, "emptyDir": {"sizeLimit": stage.weights_cache_size}})
        container["volumeMounts"].append({"name": _CACHE_VOLUME, "mountPath": stage.weights_cache})
        # A node that is short of disk first evicts pods that use more than they requested. Without a request these are all pods
        # with a cache.
        amount = f"{math.ceil((quantity(stage.weights_cache_size) + _OTHER_FILES_BYTES) / 2**20)}Mi"
        for amounts in container["resources"].values():
            amounts["ephemeral-storage"] = amount
    return _service(pipeline, pipeline.stage_name(index), "stage", template, stage.pod, cluster_local=True)


def gateway_service_account(spec: PipelineSpec) -> str:
    return spec.gateway.service_account or f"{spec.name}-gateway"


def gateway_service(pipeline: ResolvedPipeline, *, for_events: bool = False) -> KubernetesObject:
    """The Service of the gateway for clients or, with for_events, of the gateway to which Eventing delivers.

    Eventing cannot send an API key. So the gateway for events asks for none, and can be reached only inside the cluster.
    """
    spec, gateway = pipeline.spec, pipeline.spec.gateway
    name, key_secrets = (pipeline.events_gateway_name, ()) if for_events else (spec.name, gateway.api_keys_secrets)
    container = _container(
        spec, gateway.resources, gateway_environment(pipeline, key_secrets, for_events=for_events), gateway.pod
    )
    template = _template(spec, gateway.autoscaling, container, gateway.timeout_seconds, _GATEWAY_PROGRESS_SECONDS)
    # Otherwise queue-proxy (Go's ReverseProxy) closes the connection if an answer begins before the request's body was read to
    # its end: 4 to 19 % of streamed answers broke on a cluster.
    template["metadata"]["annotations"]["features.knative.dev/http-full-duplex"] = "Enabled"
    template["spec"]["serviceAccountName"] = gateway_service_account(spec)
    for number, secret in enumerate(key_secrets):  # as files, which the kubelet updates and the gateway reads again
        volume, items = f"{KEYS_ENTRY}-{number}", [{"key": KEYS_ENTRY, "path": KEYS_ENTRY}]
        template["spec"]["volumes"].append({"name": volume, "secret": {"secretName": secret, "items": items}})
        container["volumeMounts"].append({"name": volume, "mountPath": f"{KEYS_FOLDER}/{secret}", "readOnly": True})
    return _service(pipeline, name, "gateway", template, gateway.pod, cluster_local=for_events)


def _service(
    pipeline: ResolvedPipeline, name: str, component: str, template: KubernetesObject, pod: PodSpec, cluster_local: bool
) -> KubernetesObject:
    own_labels = labels(pipeline, component)
    template["metadata"]["labels"] = {**own_labels, **pod.labels}
    template["metadata"]["annotations"] |= pod.annotations
    template["spec"] |= pod.rendered()
    if cluster_local:
        own_labels["networking.knative.dev/visibility"] = "cluster-local"
    namespace, spec = pipeline.spec.namespace, {"template": template}
    return kubernetes_object("serving.knative.dev/v1", "Service", name, namespace, own_labels, spec=spec)


def _template(
    spec: PipelineSpec, scaling: Autoscaling, container: KubernetesObject, timeout_seconds: int, progress_seconds: int
) -> KubernetesObject:
    """The template of a revision: its container, autoscaling, timeouts, and the volumes that every pod has."""
    volumes: list[KubernetesObject] = [{"name": _TEMPORARY_VOLUME, "emptyDir": {}}]  # the root file system is read-only
    mounts: list[KubernetesObject] = [{"name": _TEMPORARY_VOLUME, "mountPath": "/tmp"}]
    if spec.store.web_identity is not None:
        token = {"audience": spec.store.web_identity.audience, "expirationSeconds": _TOKEN_SECONDS, "path": "token"}
        volumes.append({"name": _TOKEN_VOLUME, "projected": {"sources": [{"serviceAccountToken": token}]}})
        mounts.append({"name": _TOKEN_VOLUME, "mountPath": _TOKEN_FOLDER, "readOnly": True})
    for volume, folder in _tls_volumes(spec):
        volumes.append(volume)
        mounts.append({"name": volume["name"], "mountPath": folder, "readOnly": True})
    container["volumeMounts"] = mounts
    hpa = scaling.autoscaler_class == "hpa"
    autoscaling: dict[str, object] = {
        "class": f"{scaling.autoscaler_class}.autoscaling.knative.dev",
        "metric": "cpu" if hpa else "concurrency",
        "target": scaling.target or (70 if hpa else scaling.default_target),
        "target-utilization-percentage": None if hpa else scaling.target_utilization_percentage,
        "window": None if hpa else f"{_plain(scaling.window_seconds)}s",
        "panic-window-percentage": None if hpa else scaling.panic_window_percentage,
        "scale-down-delay": None if hpa else f"{_plain(scaling.scale_down_delay_seconds)}s",
        "min-scale": scaling.min_scale,
        "max-scale": scaling.max_scale,
        "initial-scale": scaling.initial_scale,
        "target-burst-capacity": scaling.target_burst_capacity,
    }
    annotations = {_AUTOSCALING + key: _plain(value) for key, value in autoscaling.items() if value is not None}
    return {
        "metadata": {"annotations": {**annotations, "serving.knative.dev/progress-deadline": f"{progress_seconds}s"}},
        "spec": {
            "containerConcurrency": scaling.container_concurrency,
            "timeoutSeconds": timeout_seconds,
            "responseStartTimeoutSeconds": timeout_seconds,  # its default is 300, whatever timeoutSeconds is
            "enableServiceLinks": False,
            "containers": [container],
            "volumes": volumes,
        },
    }


def _tls_volumes(spec: PipelineSpec) -> Iterator[tuple[KubernetesObject, str]]:
    """Volumes with the certificates, and where they are mounted: as files, which the kubelet updates."""
    tls = spec.network.tls
    if tls is None:
        return
    keys = ["ca.crt"] if tls.ca_config_map is None else []
    keys += ["tls.crt", "tls.key"] if tls.secret is not None else []
    if keys:
        items = [{"key": key, "path": key} for key in keys]
        yield {"name": _TLS_VOLUME, "secret": {"secretName": tls.secret or SERVING_CERTS, "items": items}}, _TLS_FOLDER
    if tls.ca_config_map is not None:
        items = [{"key": "ca.crt", "path": "ca.crt"}]
        yield {"name": _TLS_CA_VOLUME, "configMap": {"name": tls.ca_config_map, "items": items}}, _TLS_CA_FOLDER


def _tls_env(spec: PipelineSpec) -> list[KubernetesObject]:
    tls = spec.network.tls
    if tls is None:
        return []
    own = tls.secret is not None
    return _values(
        LAMINA_TLS_CA=f"{_TLS_FOLDER if tls.ca_config_map is None else _TLS_CA_FOLDER}/ca.crt",
        LAMINA_TLS_NAME=tls_name(spec),
        LAMINA_TLS_CERTIFICATE=f"{_TLS_FOLDER}/tls.crt" if own else None,
        LAMINA_TLS_KEY=f"{_TLS_FOLDER}/tls.key" if own else None,
    )


def tls_name(spec: PipelineSpec) -> str | None:
    """The DNS name that certificates of the pipeline's pods must have; None without TLS between pods."""
    tls = spec.network.tls
    if tls is None:
        return None
    # knative/networking pkg/certificates/constants.go, DataPlaneUserSAN
    return tls.name or (f"kn-user-{spec.namespace}" if tls.secret is None else f"{spec.name}.{spec.namespace}")


def pod_port(spec: PipelineSpec) -> int:
    """The port at which gateway and stages reach the pods of stages."""
    tls = spec.network.tls
    return spec.gateway.pod_port or (QUEUE_PROXY if tls is None else QUEUE_PROXY_TLS if tls.secret is None else POD_TLS)


def _container(spec: PipelineSpec, resources: Resources, env: list[KubernetesObject], pod: PodSpec) -> KubernetesObject:
    amounts: dict[str, str] = {"cpu": resources.cpu, "memory": resources.memory}
    if resources.gpu:
        amounts["nvidia.com/gpu"] = str(resources.gpu)
    keys = {} if spec.store.secret is None else {"envFrom": [{"secretRef": {"name": spec.store.secret}}]}
    return {
        "name": "user-container",  # Knative's name; kn renames any other when it applies a manifest again
        "image": spec.image,
        "ports": [{"name": "http1", "containerPort": CONTAINER_PORT}],
        "env": [*env, *_values(**pod.env)],
        **keys,
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        # No period: with one, queue-proxy asks the function once per question of the kubelet or the activator; without, it asks
        # every 50 ms until the function is ready (pkg/queue/readiness/probe.go). timeoutSeconds must not be set then, either.
        # No startupProbe: with one, the activator waits for the kubelet's verdict (pkg/activator/net/revision_backends.go).
        "readinessProbe": {"httpGet": {"path": "/readyz"}},
        # /healthz answers while weights load, so a slow load never kills the pod; a minute covers the imports.
        "livenessProbe": {"httpGet": {"path": "/healthz"}, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6},
        "securityContext": {**NON_ROOT, "capabilities": {"drop": ["ALL"]}},
    }


def _common_env(pipeline: ResolvedPipeline, role: str, dtype: str) -> list[KubernetesObject]:
    """Environment entries that stages and the gateway have in common.

    role: `stage` or `gateway`. dtype: that of the publication which the function reads.
    """
    spec, weights = pipeline.spec, pipeline.weights
    mixed = len(set(weights)) > 1 or weights[0][0] != spec.model.dtype
    env = _values(
        LAMINA_ROLE=role,
        LAMINA_PIPELINE=pipeline.fingerprint,
        LAMINA_MODEL=spec.model.name,
        LAMINA_DTYPE=dtype,
        LAMINA_CUT=format_cut(pipeline.cut),
        LAMINA_WEIGHTS=",".join(f"{kind}={digest}" for kind, digest in weights) if mixed else None,
        LAMINA_WIRE_DTYPE=spec.wire_dtype,
        LAMINA_KV_DTYPE=spec.kv_dtype,
        LAMINA_ADAPTERS=spec.adapters or None,
        LAMINA_STORE_ENDPOINT=spec.store.endpoint,
        LAMINA_STORE_BUCKET=spec.store.bucket,
        LAMINA_STORE_REGION=spec.store.region,
        LAMINA_POD_NETWORK=spec.gateway.pod_network,
        LAMINA_POD_PORT=pod_port(spec),
        LAMINA_LOG_LEVEL=spec.log_level,
    )
    if spec.store.web_identity is not None:
        env += _values(
            AWS_WEB_IDENTITY_TOKEN_FILE=f"{_TOKEN_FOLDER}/token",
            AWS_ROLE_ARN=spec.store.web_identity.role_arn,
            AWS_ENDPOINT_URL_STS=spec.store.web_identity.sts_endpoint,
        )
    if spec.tracing is not None:
        env += _values(
            OTEL_EXPORTER_OTLP_ENDPOINT=spec.tracing.endpoint,
            OTEL_TRACES_SAMPLER="parentbased_traceidratio",
            OTEL_TRACES_SAMPLER_ARG=spec.tracing.sample_ratio,
        )
    return [*env, *_tls_env(spec), _from_secret("LAMINA_PIPELINE_TOKEN", spec.token_secret, "token")]


def _stage_env(pipeline: ResolvedPipeline, index: int) -> list[KubernetesObject]:
    stage = pipeline.stages[index]
    first, last = pipeline.cut[index]
    cached = stage.weights_cache is not None
    concurrency = stage.autoscaling.container_concurrency
    tls = pipeline.spec.network.tls
    return [
        *_common_env(pipeline, "stage", pipeline.weights[index][0]),
        # This key exists only while the token is rotated: knative/cluster/pipeline_token.py.
        _from_secret("LAMINA_SECOND_PIPELINE_TOKEN", pipeline.spec.token_secret, "second", optional=True),
        *_values(
            LAMINA_LAYERS=f"{first}:{last}",
            LAMINA_TLS_PORT=pod_port(pipeline.spec) if tls is not None and tls.secret is not None else None,
            LAMINA_LAYER_GROUP=stage.layer_group,
            LAMINA_SLEEP_SECONDS=_for_stage(stage.sleep_seconds, index, "sleep_seconds"),
            **_emulated_device(stage, index),
            LAMINA_DEVICE=stage.device,
            LAMINA_THREADS=stage.threads,
            LAMINA_BUSY_THREADS=stage.busy_threads,
            LAMINA_ADAPTER_RANK=pipeline.spec.adapter_rank if pipeline.spec.adapters else None,
            LAMINA_KV_CACHE_BYTES=int(quantity(stage.kv_cache)),
            LAMINA_MAX_MERGE=stage.max_merge,
            # Memory waiters leave two of the concurrent requests for those that compute. Concurrency 0 is unlimited.
            LAMINA_MAX_MEMORY_WAITERS=max(0, concurrency - 2) if 0 < concurrency < 4 else None,
            LAMINA_IDLE_SEQUENCE_SECONDS=stage.idle_sequence_seconds,
            LAMINA_WEIGHTS_CACHE=stage.weights_cache,
            LAMINA_WEIGHTS_BUDGET_BYTES=None if stage.weights_budget is None else int(quantity(stage.weights_budget)),
            # Less than the volume's limit: the kubelet also counts blocks and folders, and evicts the pod beyond the limit.
            LAMINA_WEIGHTS_CACHE_BYTES=int(quantity(stage.weights_cache_size) * _CACHE_SHARE) if cached else None,
        ),
        *_kv_store_env(pipeline, index),
    ]


def _kv_store_env(pipeline: ResolvedPipeline, index: int) -> list[KubernetesObject]:
    """Environment entries for the store of idle conversations' KV; empty if the spec has none.

    Each stage gets a share of its bytes that is proportional to its layers.
    """
    spec, kv_store = pipeline.spec, pipeline.spec.kv_store
    if kv_store is None:
        return []
    first, last = pipeline.cut[index]
    return [
        *_values(
            LAMINA_KV_STORE=f"{kv_store.bucket or spec.store.bucket}/{kv_store.prefix}",
            LAMINA_KV_STORE_ENDPOINT=kv_store.endpoint,
            LAMINA_KV_STORE_BYTES=int(quantity(kv_store.max_bytes) * (last - first) / pipeline.cut[-1][1]),
            LAMINA_KV_STORE_AGE_SECONDS=kv_store.max_age_seconds,
            LAMINA_KV_STORE_BYTES_PER_SECOND=None if kv_store.write_rate is None else int(quantity(kv_store.write_rate)),
        ),
        _from_secret("LAMINA_KV_KEY", kv_store.secret, "key"),
        _from_secret("LAMINA_KV_STORE_ACCESS_KEY_ID", kv_store.secret, "AWS_ACCESS_KEY_ID", optional=True),
        _from_secret("LAMINA_KV_STORE_SECRET_ACCESS_KEY", kv_store.secret, "AWS_SECRET_ACCESS_KEY", optional=True),
    ]


def _drain_seconds(timeout_seconds: int) -> int | None:
    """How long a gateway's answers may go on after SIGTERM; None: the function's default, which is that of the longest timeout.

    A pod is killed `timeoutSeconds` after it was told to end. Of these, queue-proxy's drain takes 30 s before SIGTERM comes. Of
    the rest up to 30 s are for the last replies.
    """
    left = timeout_seconds - 30
    return None if timeout_seconds == 600 else max(1, left - 30, left * 2 // 3)


def _emulated_device(stage: StageSpec, index: int) -> dict[str, Any]:
    """Environment of a stage that emulates a device, by key; values are None if it does not.

    Raises SpecError if such a field is set and the layer group is not `sleep`.
    """
    for name in ("sleep_pass_times", "sleep_bytes_per_second"):
        if getattr(stage, name) is not None and stage.layer_group != "sleep":
            raise SpecError(f"$.stage.{name}: emulates a device, and $.stage.layer_group is {stage.layer_group}, not sleep")
    times = _for_stage(stage.sleep_pass_times, index, "sleep_pass_times")
    return {
        "LAMINA_SLEEP_PASS_TIMES": None if times is None else msgspec.json.encode(times).decode(),
        "LAMINA_SLEEP_BYTES_PER_SECOND": stage.sleep_bytes_per_second,
    }


def _for_stage(value: T | list[T] | None, index: int, name: str) -> T | None:
    """Value of a spec field for one stage: the only value, or the stage's from a list with one for each stage.

    name: the field's. Raises SpecError if the list is too short.
    """
    if not isinstance(value, list):
        return value
    if index >= len(value):
        raise SpecError(f"$.stage.{name}: {len(value)} given, none for stage {index}")
    return value[index]


def gateway_environment(
    pipeline: ResolvedPipeline, key_secrets: Sequence[str] = (), *, for_events: bool = False
) -> list[KubernetesObject]:
    """Environment entries of the pipeline's gateway. key_secrets: those whose API keys it takes."""
    gateway = pipeline.spec.gateway
    memory = gateway.resources.memory
    prompt_bytes = None if memory == GatewayResources().memory else int(_PROMPT_SHARE * quantity(memory))
    stages = ",".join(f"{first}:{last}={pipeline.stage_url(k)}" for k, (first, last) in enumerate(pipeline.cut))
    env = [
        *_common_env(pipeline, "gateway", pipeline.spec.model.dtype),
        *_values(
            LAMINA_STAGES=stages,
            LAMINA_STAGE_SERVICES=",".join(pipeline.stage_names),
            LAMINA_STAGE_TARGETS=",".join(_plain(stage.autoscaling.target_concurrency) for stage in pipeline.stages),
            LAMINA_PAGE="off" if for_events else gateway.page,
            LAMINA_QUEUE_LIMIT=gateway.queue_limit,
            LAMINA_KEEP_ALIVE_SECONDS=gateway.keep_alive_seconds,
            LAMINA_CHUNK_TOKENS=gateway.chunk_tokens,
            LAMINA_PROMPT_BYTES=prompt_bytes,
            LAMINA_MICRO_BATCH_SEQUENCES=gateway.micro_batch_sequences,
            LAMINA_DRAFT_TOKENS=gateway.draft_tokens,
            # `client` is the default with keys, and means nothing to the gateway for events, which has none.
            LAMINA_PREFIX_SHARING=None if gateway.prefix_sharing == "client" else gateway.prefix_sharing,
            LAMINA_TOOL_PARSER=gateway.tool_parser,
            LAMINA_PARSE_CONTROL_TOKENS="on" if gateway.parse_control_tokens else None,
            LAMINA_STAGES_AT_ONCE=gateway.stages_at_once,
            LAMINA_OBJECTIVE=_objective(pipeline.spec),
            LAMINA_COLD_START_TIMEOUT_SECONDS=gateway.cold_start_timeout_seconds,
            LAMINA_REQUEST_TIMEOUT_SECONDS=gateway.request_timeout_seconds,
            LAMINA_DRAIN_SECONDS=_drain_seconds(gateway.timeout_seconds),
            LAMINA_STEP_TIMEOUT_SECONDS=gateway.step_timeout_seconds,
            LAMINA_KUBERNETES_API="cluster",
            LAMINA_NAMESPACE=pipeline.spec.namespace,
            LAMINA_ACCESS_LOG=gateway.access_log,
            LAMINA_CLIENT_REQUESTS_PER_MINUTE=gateway.client_requests_per_minute,
            LAMINA_CLIENT_TOKENS_PER_MINUTE=gateway.client_tokens_per_minute,
            LAMINA_CLIENT_TOKENS_PER_DAY=gateway.client_tokens_per_day,
            LAMINA_CLIENT_TOKENS_PER_MONTH=gateway.client_tokens_per_month,
            LAMINA_CLIENT_CONCURRENT=gateway.client_concurrent,
            LAMINA_CLIENT_MAX_TOKENS=gateway.client_max_tokens,
            LAMINA_CORS_ORIGINS=",".join(gateway.cors_origins) if gateway.cors_origins else None,
            LAMINA_HOSTS=",".join(gateway.hosts) if gateway.hosts else None,
            LAMINA_API_KEY_FILES=",".join(f"{KEYS_FOLDER}/{secret}/{KEYS_ENTRY}" for secret in key_secrets) or None,
            LAMINA_PROXIES=gateway.proxies,
            LAMINA_SCORES="on" if for_events else None,
            **(_jobs(pipeline, for_events) if gateway.jobs else {}),
        ),
    ]
    if gateway.limits_secret is not None:
        env.append(_from_secret("LAMINA_LIMITS_STORE", gateway.limits_secret, "url"))
    return env


def _objective(spec: PipelineSpec) -> str | None:
    """What the gateway needs of the spec's objective, as JSON."""
    if spec.objective is None:
        return None
    given = spec.objective
    own = Objective(first_token_seconds=given.first_token_seconds, token_seconds=given.token_seconds, share=given.share)
    return msgspec.json.encode(own).decode()


def _jobs(pipeline: ResolvedPipeline, for_events: bool) -> dict[str, object]:
    """Environment of a gateway that serves files and batches, by key."""
    spec, name = pipeline.spec, pipeline.events_gateway_name if for_events else pipeline.spec.name
    return {
        "LAMINA_JOBS_STORE": f"{spec.store.bucket}/{spec.gateway.jobs}",
        "LAMINA_JOBS_RETENTION_SECONDS": spec.gateway.jobs_retention_seconds,
        "LAMINA_OWN_URL": cluster_url(name, spec.namespace),
    }


def _values(**values: object) -> list[KubernetesObject]:
    """Environment entries. A value None is left out, so that the function's own default applies."""
    return [{"name": name, "value": _plain(value)} for name, value in values.items() if value is not None]


def _from_secret(name: str, secret: str, key: str, *, optional: bool = False) -> KubernetesObject:
    reference: KubernetesObject = {"name": secret, "key": key, **({"optional": True} if optional else {})}
    return {"name": name, "valueFrom": {"secretKeyRef": reference}}


def _plain(value: object) -> str:
    """A value as text. 2.0 becomes `2`, which Kubernetes and Knative read as well."""
    return f"{value:g}" if isinstance(value, float) else str(value)
