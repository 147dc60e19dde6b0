"""PipelineSpec: a pipeline as a user describes it in YAML. Everything else follows from it and from the model's manifest.

Defaults are here and nowhere else. `spec_file` reads the YAML. A field that is None is explained by its comment: "Unset: …".
"""

import ipaddress
import re
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
from msgspec import Meta, Struct

from eventing.wire.events import Cut
from functions.configuration.pass_times import PassTimes
from knative.spec.cut import parse_cut
from knative.spec.errors import SpecError
from knative.spec.objective import ObjectiveSpec
from knative.spec.stage_overrides import PATH, changed, overridden
from knative.webhook.values import parse_quantity

DTYPES: Final = ("float32", "bfloat16", "float16", "int8", "q4", "kept")
MIXABLE_DTYPES: Final = frozenset(("bfloat16", "int8", "q4", "kept"))  # hidden states travel in bf16, so stages may differ
MAX_NAME: Final = 36  # the longest DNS label made of a name, `{name}-{fingerprint[:8]}-s{k}-00001-private`, has 63 characters
MAX_NAME_WITH_EVENTING: Final = 28  # Eventing makes `{name}-{fingerprint[:8]}-kn-sequence-10-kn-channel` of a Sequence
KV_PREFIX: Final = "kv"
KEYS_ENTRY: Final = "api-keys"  # the key in a Secret under which API keys are

_LABEL: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED_LABELS: Final = ("app.kubernetes.io/", "lamina.dev/", "serving.knative.dev/")
_RESERVED_ANNOTATIONS: Final = ("autoscaling.knative.dev/",)

Seconds = Annotated[float, Meta(gt=0, le=10_000_000)]  # the bounds of functions/configuration/parsers.py
Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
TimeoutSeconds = Annotated[int, Meta(ge=1, le=600)]
Concurrency = Annotated[int, Meta(ge=0, le=1000)]
Url = Annotated[str, Meta(pattern="^https?://")]
DnsName = Annotated[str, Meta(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]  # also the form of names of Secrets and ConfigMaps


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number: `500m` → 0.5, `512Mi` → 536870912. Raises SpecError."""
    try:
        amount = parse_quantity(text)
    except ValueError as error:
        raise SpecError(str(error)) from error
    if amount < 0:
        raise SpecError(f"{text!r} is negative")
    return float(amount)


def _check_quantity(path: str, text: str) -> None:
    try:
        quantity(text)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


def _check_label(path: str, value: str, longest: int) -> None:
    if not _LABEL.fullmatch(value) or len(value) > longest:
        raise SpecError(f"{path}: {value!r} is not a DNS label of at most {longest} characters (a-z, 0-9, '-'; a letter first)")


def _check_choice(path: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SpecError(f"{path}: {value!r} is not one of {', '.join(choices)}")


class ModelSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model in one dtype, as `python -m knative push` publishes it in the store."""

    name: str
    dtype: str = "bfloat16"
    # Weights digest that `push` prints; pins the publication and lets `render` work without the store.
    digest: str | None = None
    digests: dict[str, str] = {}  # dtype → digest, for other dtypes in which some stages compute (stage_overrides)


class Resources(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resources of a pod as Kubernetes quantities.

    Each is both request and limit, because a stage that is throttled or evicted breaks routes.
    """

    cpu: str = "1"
    memory: str = "2Gi"
    gpu: Natural = 0


class GatewayResources(Resources, frozen=True, kw_only=True, forbid_unknown_fields=True):
    cpu: str = "500m"
    memory: str = "512Mi"


class Autoscaling(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of Knative's autoscaler for one Service, in Knative's units. The defaults have worked together on a cluster."""

    default_target: ClassVar[float] = 2
    autoscaler_class: Annotated[str, Meta(pattern="^(kpa|hpa)$")] = msgspec.field(name="class", default="kpa")
    container_concurrency: Concurrency = 8
    # Requests in flight per pod; with class hpa, percent of CPU. Unset: 2 (gateway: 100), with hpa 70 percent.
    target: Annotated[float, Meta(ge=0.01)] | None = None
    target_utilization_percentage: Annotated[float, Meta(ge=1, le=100)] = 70
    window_seconds: Annotated[float, Meta(ge=6, le=3600)] = 10
    # Percent of the window: 6 s, as with Knative's defaults of 10 % of 60 s. With 10 % of 10 s, a few prompts within one second
    # would count as a surge, and the pods that they ask for stay for the scale-down delay.
    panic_window_percentage: Annotated[float, Meta(ge=1, le=100)] = 60
    # Longer than a micro-batch ever stays away from a stage; otherwise idle pods that hold KV are removed.
    scale_down_delay_seconds: Annotated[float, Meta(ge=0, le=3600)] = 30
    min_scale: Natural = 0
    max_scale: Positive = 10  # always set: the only limit on bursts
    initial_scale: Positive | None = None
    # Unset: the cluster's. -1 is not allowed: Knative would not read queue-proxies and would miss direct traffic.
    target_burst_capacity: Annotated[float, Meta(ge=0)] | None = None

    @property
    def target_concurrency(self) -> float:
        """Average requests in flight per pod above which Knative adds another pod. 0 with class hpa, which scales by CPU."""
        if self.autoscaler_class == "hpa":
            return 0.0
        return round((self.target or self.default_target) * self.target_utilization_percentage / 100, 4)

    def check(self, path: str) -> None:
        """Raises SpecError if settings contradict each other. path: where in the spec they are, for the message."""
        if self.min_scale > self.max_scale:
            raise SpecError(f"{path}.min_scale: {self.min_scale} is above max_scale {self.max_scale}")
        limit = self.container_concurrency
        if self.autoscaler_class == "kpa" and limit and (self.target or 0) > limit:
            raise SpecError(f"{path}.target: {self.target} is above container_concurrency {limit} and would never be reached")
        if self.autoscaler_class == "hpa" and self.min_scale == 0:
            raise SpecError(f"{path}.min_scale: 0, but the class hpa cannot scale to zero; use 1 or the class kpa")


class GatewayAutoscaling(Autoscaling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Autoscaling with the defaults for a gateway, which mostly waits for stages."""

    default_target: ClassVar[float] = 100
    container_concurrency: Concurrency = 0
    max_scale: Positive = 3


class PodSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of a Kubernetes pod, passed on as they are.

    Knative accepts the first six only if their flags in config-features are on (knative/webhook/feature_flags.py); `deploy`
    checks the flags and names a missing one.
    """

    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    affinity: dict[str, Any] | None = None
    # Select by app.kubernetes.io/instance and app.kubernetes.io/component, which all pods of a pipeline have.
    topology_spread_constraints: list[dict[str, Any]] = []
    priority_class: str | None = None
    runtime_class: str | None = None
    image_pull_secrets: list[str] = []
    labels: dict[str, str] = {}  # of the pods, in addition to Lamina's
    annotations: dict[str, str] = {}
    env: dict[str, str] = {}  # of the function's container, such as HTTPS_PROXY; not for settings that have a spec field

    def rendered(self) -> dict[str, Any]:
        """The fields that are set and belong into a pod's spec, by Kubernetes' names."""
        fields: dict[str, Any] = {
            "nodeSelector": self.node_selector,
            "tolerations": self.tolerations,
            "affinity": self.affinity,
            "topologySpreadConstraints": self.topology_spread_constraints,
            "priorityClassName": self.priority_class,
            "runtimeClassName": self.runtime_class,
            "imagePullSecrets": [{"name": name} for name in self.image_pull_secrets],
        }
        return {name: value for name, value in fields.items() if value}

    def check(self, path: str) -> None:
        """Raises SpecError for a name that is invalid or reserved. path: where in the spec the fields are, for the message."""
        for name in self.env:
            if not _ENV_NAME.fullmatch(name):
                raise SpecError(f"{path}.env: {name!r} is not a valid name of a variable")
            if name.startswith("LAMINA_"):
                raise SpecError(f"{path}.env: {name} is set by a field of the spec; set that field instead (docs/reference.md)")
        for kind, names, reserved in (
            ("labels", self.labels, _RESERVED_LABELS),
            ("annotations", self.annotations, _RESERVED_ANNOTATIONS),
        ):
            for name in names:
                if name.startswith(reserved):
                    raise SpecError(f"{path}.{kind}: {name} is reserved for Lamina or Knative; set the spec's field instead")


class StageSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of every stage; `stage_overrides` changes them for some stages."""

    dtype: str | None = None  # of the weights; the model must be published in it. Unset: the model's
    resources: Resources = Resources()
    kv_cache: str = "512Mi"  # KV budget of one pod, a quantity of bytes
    layer_group: Annotated[str, Meta(pattern="^(auto|native|llama|transformers|sleep)$")] = "auto"
    # Layer group `sleep`: seconds per forward pass, one value or one per stage.
    sleep_seconds: Seconds | list[Seconds] | None = None
    sleep_pass_times: PassTimes | list[PassTimes] | None = None  # instead: durations of an emulated device, likewise
    # Emulated speed of loading weights, which delays a pod's start. Unset: no delay.
    sleep_bytes_per_second: Positive | None = None
    device: Annotated[str, Meta(pattern="^(auto|cpu|cuda)$")] = "auto"
    threads: Natural = 0
    busy_threads: Positive | None = None  # of a busy fp32 stage that shares cores with others. Unset: as `threads`
    max_merge: Positive | None = None
    idle_sequence_seconds: Seconds | None = None
    timeout_seconds: TimeoutSeconds = 600  # also the grace period of a terminating pod
    progress_deadline_seconds: Positive = 600  # how long weights may take to load before the revision counts as failed
    # Folder of an emptyDir for verified weights: helps restarts of a container, not new pods.
    weights_cache: Annotated[str, Meta(pattern="^/")] | None = None
    weights_cache_size: str = "2Gi"
    # Most memory for weights, less than the stage's: experts that were used the longest ago are dropped, and read from
    # weights_cache when they are used again. Unset: all stay.
    weights_budget: str | None = None
    service_account: str | None = None  # for example one with workload identity. Unset: the namespace's default
    pod: PodSpec = PodSpec()
    autoscaling: Autoscaling = Autoscaling()

    def check(self, path: str, model_dtype: str, kv_dtype: str | None = None) -> None:
        """Raises SpecError for an invalid quantity, or for settings that contradict each other.

        path: where in the spec they are, for the message. model_dtype: the model's, which applies if `dtype` is unset.
        kv_dtype: the pipeline's.
        """
        dtype = self.dtype or model_dtype
        _check_choice(f"{path}.dtype", dtype, DTYPES)
        if dtype != model_dtype and not {dtype, model_dtype} <= MIXABLE_DTYPES:
            raise SpecError(
                f"{path}.dtype: {dtype} cannot be combined with $.model.dtype {model_dtype}, because hidden states travel "
                f"in different dtypes; only {', '.join(sorted(MIXABLE_DTYPES))} can be combined"
            )
        self.autoscaling.check(f"{path}.autoscaling")
        _check_quantity(f"{path}.resources.cpu", self.resources.cpu)
        _check_quantity(f"{path}.resources.memory", self.resources.memory)
        _check_quantity(f"{path}.kv_cache", self.kv_cache)
        _check_quantity(f"{path}.weights_cache_size", self.weights_cache_size)
        if self.weights_budget is not None:
            _check_quantity(f"{path}.weights_budget", self.weights_budget)
            if self.weights_cache is None:
                raise SpecError(f"{path}.weights_budget takes weights_cache, the folder that experts are read from; name one")
            if self.layer_group not in ("auto", "native") or self.device == "cuda":
                raise SpecError(f"{path}.weights_budget takes layers in C on a CPU; set layer_group and device to auto")
        self.pod.check(f"{path}.pod")
        if self.device == "cuda" and dtype in ("int8", "q4"):
            raise SpecError(f"{path}.device: 'cuda' does not run dtype {dtype}; use auto or cpu, or another dtype")
        for name, value in (("device", self.device), ("layer_group", self.layer_group), ("dtype", dtype)):
            if kv_dtype is not None and value in ("cuda", "llama", "transformers", "sleep", "float16"):
                raise SpecError(f"{path}.{name}: {value!r} does not run with $.kv_dtype {kv_dtype}, which takes layers in C")
        if self.layer_group == "transformers" and dtype in ("int8", "q4"):
            raise SpecError(f"{path}.layer_group: 'transformers' does not run dtype {dtype}; use auto, or another dtype")


class GatewaySpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the gateway. If a field without a comment is unset, the function's own default applies."""

    resources: GatewayResources = GatewayResources()
    micro_batch_sequences: Positive | None = None
    stages_at_once: Positive | None = None  # stages that can compute at the same time, if they share cores. Unset: all
    chunk_tokens: Positive | None = None
    draft_tokens: Natural | None = None  # most draft tokens of a row in one step; 0: no speculation
    # Which requests reuse each other's KV: all; those with one API key; those with one cache_salt; none. The time of an
    # answer shows whether its prompt's KV was reused, so with `pipeline` any client can guess what others asked. Unset:
    # client if there are API keys, else request.
    prefix_sharing: Literal["pipeline", "client", "request", "off"] | None = None
    tool_parser: Literal["hermes", "llama3_json", "mistral"] | None = None  # syntax of tool calls. Unset: by the chat template
    # Text of messages and tools that spells a control token, such as <|im_end|>, becomes that token. Then any text can end its
    # message and open a system turn: set it only if nothing in messages comes from strangers.
    parse_control_tokens: bool = False
    queue_limit: Positive | None = None
    cold_start_timeout_seconds: Seconds | None = None
    request_timeout_seconds: Seconds | None = None
    step_timeout_seconds: Seconds | None = None
    timeout_seconds: TimeoutSeconds = 600
    # Silence after which a stream sends a comment, so that clients do not take it for dead. 0: never. Unset: 10.
    keep_alive_seconds: Annotated[float, Meta(ge=0, le=3600)] | None = None
    # Secret, or several, whose key `api-keys` holds API keys (`python -m knative keys`). Unset: no key is needed.
    api_keys_secret: str | Annotated[list[str], Meta(min_length=1)] | None = None
    # This limit and the next two hold for one client (API key or address) at one gateway pod. Unset: no limit.
    client_requests_per_minute: Positive | None = None
    client_tokens_per_minute: Positive | None = None
    client_concurrent: Positive | None = None
    # Budgets of one client in a calendar day or month (UTC), at all pipelines that use the store of `limits_secret`.
    client_tokens_per_day: Positive | None = None
    client_tokens_per_month: Positive | None = None
    client_max_tokens: Positive | None = None  # longest answer; it ends there. Unset: the rest of the context
    # Secret whose key `url` is a Redis in which all pods count together. Unset: each pod alone.
    limits_secret: str | None = None
    cors_origins: list[str] | None = None  # origins whose pages may ask from a browser, or `*`. Unset: none
    # More names by which a gateway without API keys is asked; docs/security.md, Pages of other sites. Unset: none
    hosts: list[str] | None = None
    # One line of JSON per request; prompts: with prompt and answer. Unset: on.
    access_log: Annotated[str, Meta(pattern="^(on|off|prompts)$")] | None = None
    proxies: Annotated[int, Meta(ge=0, le=16)] | None = None  # how many add to X-Forwarded-For, with queue-proxy. Unset: 1
    # Prefix in the store's bucket for files and batches of clients (/v1/files, /v1/batches), where the store's keys may write.
    # An open batch keeps a gateway from scaling to zero. Unset: they are not served.
    jobs: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$")] | None = None
    # Age at which files and ended batches are deleted; 0: they stay. Unset: 2592000, 30 days
    jobs_retention_seconds: Natural | None = None
    page: Annotated[str, Meta(pattern="^(on|off)$")] | None = None  # `GET /`: chat and pipeline status. Unset: on
    # ServiceAccount that may watch EndpointSlices. Unset: `{name}-gateway`, which is rendered with its Role.
    service_account: str | None = None
    pod_network: str | None = None  # CIDRs, comma-separated; no requests go to pods outside. Unset: private addresses
    pod_port: Annotated[int, Meta(ge=1, le=65535)] | None = (
        None  # unset: 8012, with TLS 8112, with certificates of its own 8443
    )
    max_unavailable: Positive | None = None  # pods that may be evicted at once (PodDisruptionBudget). Unset: all
    pod: PodSpec = PodSpec()
    autoscaling: GatewayAutoscaling = GatewayAutoscaling()

    def __post_init__(self) -> None:
        self.autoscaling.check("$.gateway.autoscaling")
        _check_quantity("$.gateway.resources.cpu", self.resources.cpu)
        _check_quantity("$.gateway.resources.memory", self.resources.memory)
        self.pod.check("$.gateway.pod")
        if self.limits_secret is None:
            for name in ("client_tokens_per_day", "client_tokens_per_month"):
                if getattr(self, name) is not None:
                    raise SpecError(f"$.gateway.{name}: a budget is counted in a store; set limits_secret, or leave it out")
        if self.prefix_sharing == "client" and self.api_keys_secret is None:
            raise SpecError(
                "$.gateway.prefix_sharing: 'client' is not allowed without api_keys_secret, because only keys tell clients "
                "apart; use request, or pipeline to share among all"
            )
        try:
            for part in self.pod_network.split(",") if self.pod_network else ():
                ipaddress.ip_network(part.strip())
        except ValueError as error:
            raise SpecError(
                f"$.gateway.pod_network: {self.pod_network!r} is not a list of networks such as 10.244.0.0/16 ({error})"
            ) from error

    @property
    def api_keys_secrets(self) -> tuple[str, ...]:
        secrets = self.api_keys_secret
        return () if secrets is None else (secrets,) if isinstance(secrets, str) else tuple(secrets)


class WebIdentity(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Access to the store with the pods' ServiceAccount tokens (AssumeRoleWithWebIdentity), instead of keys."""

    audience: str = "sts.amazonaws.com"
    role_arn: str | None = None  # unset: the service derives the rights from the token, as MinIO does
    sts_endpoint: Url | None = None  # unset: that of AWS in `region`


class StoreSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The S3-compatible store that pods read weights from."""

    endpoint: Url
    bucket: str = "lamina"
    region: str = "us-east-1"
    # Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if needed, AWS_SESSION_TOKEN. null: pods authenticate by their
    # ServiceAccounts (stage.service_account, gateway.service_account).
    secret: str | None = "lamina-store"
    # Only with `secret: null`. Unset: the cluster gives pods a token, as EKS's webhook does for annotated ServiceAccounts.
    web_identity: WebIdentity | None = None

    def __post_init__(self) -> None:
        if self.web_identity is not None and self.secret is not None:
            raise SpecError("$.store.web_identity: cannot be combined with keys; set $.store.secret to null")


class KVStoreSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A store for KV of idle conversations, encrypted. Pods that end save it there, so that it is not computed again."""

    # Secret whose key `key` (64 hexadecimal digits) encrypts. Its AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY may read, write,
    # list and delete below the prefix; without them the pods' own keys are used.
    secret: str
    bucket: str | None = None  # unset: the models' bucket
    prefix: Annotated[str, Meta(pattern="^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$")] = KV_PREFIX
    endpoint: Url | None = None  # unset: the models' endpoint
    max_bytes: str = "10Gi"  # limit for the whole pipeline, a quantity; the oldest KV is deleted first
    max_age_seconds: Seconds | None = None  # older objects are deleted. Unset: seven days
    write_rate: str | None = None  # most bytes per second that a pod writes, a quantity. Unset: 64Mi

    def __post_init__(self) -> None:
        _check_quantity("$.kv_store.max_bytes", self.max_bytes)
        _check_quantity("$.kv_store.write_rate", self.write_rate or "1")


class TLSSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TLS between gateway and stages, and between stages.

    Without `secret` it is Knative's own, which needs `system-internal-tls` in config-network.
    """

    # Secret with tls.crt, tls.key and ca.crt, as cert-manager writes it: pods show that certificate to each other (mutual TLS).
    secret: DnsName | None = None
    # DNS name in the pods' certificates. Unset: with `secret` `{name}.{namespace}`, else Knative's `kn-user-{namespace}`.
    name: DnsName | None = None
    # ConfigMap whose key ca.crt has the CA, as trust-manager writes it. Unset: ca.crt of the Secret (Knative's: serving-certs).
    ca_config_map: DnsName | None = None


class NetworkSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """NetworkPolicies, and the namespaces whose pods they let reach the pipeline, in addition to Knative's own."""

    policies: bool = True  # render NetworkPolicies; networks that do not implement them ignore them
    # One, or several: Contour has contour-external for clients and contour-internal for cluster-local Services.
    ingress_namespace: str | Annotated[list[str], Meta(min_length=1)] = "kourier-system"
    monitoring_namespace: str = "monitoring"
    tls: TLSSpec | None = None  # unset: plain HTTP between pods

    @property
    def ingress_namespaces(self) -> tuple[str, ...]:
        names = self.ingress_namespace
        return (names,) if isinstance(names, str) else tuple(names)


class Channel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Kind of the Knative Channel that holds events between steps of the Sequence."""

    api_version: str = "messaging.knative.dev/v1"
    kind: str = "InMemoryChannel"  # loses its events when its pod restarts; name a durable one if they must not be lost


class EventingSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Broker with Triggers that generate answers, and a Sequence that scores texts.

    Both ask for no API key, because events carry none.
    """

    dead_letter_sink: str  # receives events that cannot be delivered: a URL, or a Knative Service in the namespace
    reply_sink: str | None = None  # receives responses, likewise. Unset: subscribe with a Trigger of your own
    broker_class: str = "MTChannelBasedBroker"
    channel: Channel = Channel()
    retry: Annotated[int, Meta(ge=0, le=100)] = 5
    backoff_policy: Annotated[str, Meta(pattern="^(exponential|linear)$")] = "exponential"
    backoff_seconds: Annotated[float, Meta(gt=0, le=3600)] = 1
    timeout_seconds: TimeoutSeconds = 600  # of one delivery: as long as the longest answer, cold start included

    def __post_init__(self) -> None:
        for field, sink in (("dead_letter_sink", self.dead_letter_sink), ("reply_sink", self.reply_sink)):
            if sink is not None and not re.match("https?://[^/]", sink):
                if "/" in sink or ":" in sink:
                    raise SpecError(f"$.eventing.{field}: {sink!r} is neither an http(s) URL nor the name of a Service")
                _check_label(f"$.eventing.{field}", sink, 63)


class MonitoringSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a PodMonitor and a PrometheusRule. The cluster needs the Prometheus operator."""

    labels: dict[str, str] = {}  # of both objects, by which Prometheus selects them, such as `release: prometheus`
    interval_seconds: Annotated[int, Meta(ge=1, le=300)] = 15
    queue_proxy_metrics: bool = False  # needs `request-metrics-protocol: prometheus` in config-observability
    alerts: bool = True


class Tracing(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Traces of gateway and stages, sent by OTLP over HTTP."""

    endpoint: Url  # URL of a collector, without /v1/traces
    # Share of requests that are traced, if the client has not decided that. A trace has a span for each step and stage.
    sample_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.1


class PipelineSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole pipeline. It has either `stages`, a number of stages, or `cut`, their layers, such as `0:10,10:20,20:30`."""

    name: str
    namespace: str = "default"
    model: ModelSpec
    stages: Positive | None = None
    cut: str | None = None
    wire_dtype: Literal["int8"] | None = None  # of hidden states between stages; int8 may change answers. Unset: as computed
    kv_dtype: Literal["int8"] | None = None  # of keys and values; int8 may change answers. Unset: bf16, float32 with float32
    # Most adapters (LoRA) that a stage keeps in memory, of ranks up to adapter_rank. 0: none are served.
    adapters: Annotated[int, Meta(ge=0, le=1024)] = 0
    adapter_rank: Annotated[int, Meta(ge=1, le=256)] = 16
    image: str
    # Secret whose key `token` authenticates gateway and stages to each other. Unset: `{name}-pipeline`, which `deploy` creates.
    pipeline_token_secret: str | None = None
    # What answers shall keep. Autoscaling and batches that the spec leaves open follow from it (docs/scaling.md). Unset: none
    objective: ObjectiveSpec | None = None
    stage: StageSpec = StageSpec()
    stage_overrides: list[dict[str, Any]] = []  # each with `stage: 1` or `layers: 10:20`, and fields of `stage` to change
    gateway: GatewaySpec = GatewaySpec()
    store: StoreSpec
    kv_store: KVStoreSpec | None = None  # unset: KV that no pod has any more is computed again
    network: NetworkSpec = NetworkSpec()
    eventing: EventingSpec | None = None  # unset: HTTP only
    monitoring: MonitoringSpec | None = None  # unset: no objects of the Prometheus operator
    tracing: Tracing | None = None  # unset: traceparent is passed on, nothing is recorded
    log_level: Annotated[str, Meta(pattern="^(debug|info|warning|error)$")] = "info"

    def __post_init__(self) -> None:
        _check_label("$.name", self.name, MAX_NAME if self.eventing is None else MAX_NAME_WITH_EVENTING)
        _check_label("$.namespace", self.namespace, 63)
        _check_choice("$.model.dtype", self.model.dtype, DTYPES)
        self.stage.check("$.stage", self.model.dtype, self.kv_dtype)
        for number, override in enumerate(self.stage_overrides):
            changed(self.stage, override, number).check(f"{PATH}[{number}]", self.model.dtype, self.kv_dtype)
        for dtype in self.model.digests:
            _check_choice("$.model.digests", dtype, DTYPES)
        if (self.stages is None) == (self.cut is None):
            raise SpecError(f"$.stages, $.cut: exactly one of them is needed, seen {self.stages!r} and {self.cut!r}")
        if self.cut is not None:
            parse_cut(self.cut, "$.cut")

    @property
    def token_secret(self) -> str:
        return self.pipeline_token_secret or f"{self.name}-pipeline"

    def stages_of(self, cut: Cut) -> tuple[StageSpec, ...]:
        """Settings of each stage of the cut. Raises SpecError if an override selects no stage."""
        return overridden(self.stage, self.stage_overrides, cut)

    def dtypes_of(self, cut: Cut) -> tuple[str, ...]:
        """Weight dtype of each stage of the cut."""
        return tuple(stage.dtype or self.model.dtype for stage in self.stages_of(cut))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """All dtypes in which the model must be published, beginning with the model's own."""
        own = [self.stage.dtype, *(override.get("dtype") for override in self.stage_overrides)]
        return tuple(dict.fromkeys([self.model.dtype, *(dtype for dtype in own if dtype)]))
