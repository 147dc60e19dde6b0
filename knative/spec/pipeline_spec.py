"""PipelineSpec: what a person says of a pipeline, in YAML; everything else is derived from it and the model's manifest.

A default lives here and nowhere else. `spec_file` reads it.
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
from knative.spec.kv_store import KVStore
from knative.spec.pod import Pod, check_pod
from knative.spec.stage_overrides import PATH, changed, overridden
from knative.spec.tracing import Tracing
from knative.spec.web_identity import WebIdentity
from knative.webhook.values import parse_quantity

DTYPES: Final = ("float32", "bfloat16", "float16", "int8", "q4")
MIXABLE_DTYPES: Final = frozenset(("bfloat16", "int8", "q4"))
"""Their hidden states travel in bf16, so that one stage may compute in one of them and the next in another."""
MAX_NAME_WITH_EVENTING: Final = 28
"""`{name}-{fingerprint[:8]}-kn-sequence-10-kn-channel` is a DNS label too, which Eventing makes of a Sequence's name."""
MAX_NAME: Final = 36
"""`{name}-{fingerprint[:8]}-s{k}-00001-private` is the longest DNS label that is made of a name: 63 characters."""

_LABEL: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")

Seconds = Annotated[float, Meta(gt=0, le=10_000_000)]
"""What functions/configuration/parsers.py takes."""
Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]


class Model(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A publication in the model repository: `python -m knative push` makes one."""

    name: str
    dtype: str = "bfloat16"
    digest: str | None = None
    """Weights digest as `push` prints it. Pins the publication, and lets `render` work without the store."""
    digests: dict[str, str] = {}
    """The same of other dtypes, in which single stages compute (`stage_overrides`, `dtype`)."""


class Resources(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Kubernetes quantities, requested and limited alike: a stage that is throttled or evicted breaks routes."""

    cpu: str = "1"
    memory: str = "2Gi"
    gpu: Natural = 0


class Autoscaling(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Knative's own words and units; the defaults are the ones that worked together on a cluster."""

    autoscaler_class: Annotated[str, Meta(pattern="^(kpa|hpa)$")] = msgspec.field(name="class", default="kpa")
    container_concurrency: Annotated[int, Meta(ge=0, le=1000)] = 8
    target: Annotated[float, Meta(ge=0.01)] | None = None
    """Requests in flight that one pod is meant for; with the class hpa, percent of CPU. Unset: 2 (a gateway's: 100), or 70
    percent."""
    target_utilization_percentage: Annotated[float, Meta(ge=1, le=100)] = 70
    window_seconds: Annotated[float, Meta(ge=6, le=3600)] = 10
    panic_window_percentage: Annotated[float, Meta(ge=1, le=100)] = 60
    """Of the window: 6 s, as Knative has by default with its window of 60 s. Its 10 % of 10 s is one second, in which a few
    prompts at once are a surge; and what one second asks for stays for the scale-down delay."""
    scale_down_delay_seconds: Annotated[float, Meta(ge=0, le=3600)] = 30
    """Longer than a micro-batch is ever away from a stage, or idle holders of KV are taken."""
    min_scale: Natural = 0
    max_scale: Positive = 10
    """The only brake on bursts, so there always is one."""
    initial_scale: Positive | None = None
    default_target: ClassVar[float] = 2
    target_burst_capacity: Annotated[float, Meta(ge=0)] | None = None
    """Unset: the cluster's own. -1 is refused: Knative then reads no queue-proxy and cannot see direct traffic."""

    @property
    def target_concurrency(self) -> float:
        """Of one replica on average, above which another one is added; 0 where concurrency does not count."""
        if self.autoscaler_class == "hpa":
            return 0.0
        return round((self.target or self.default_target) * self.target_utilization_percentage / 100, 4)


class GatewayAutoscaling(Autoscaling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The same of a gateway, which mostly waits."""

    container_concurrency: Annotated[int, Meta(ge=0, le=1000)] = 0
    max_scale: Positive = 3
    default_target: ClassVar[float] = 100


class GatewayResources(Resources, frozen=True, kw_only=True, forbid_unknown_fields=True):
    cpu: str = "500m"
    memory: str = "512Mi"


class Stage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every stage gets."""

    dtype: str | None = None
    """In which it computes, which the model has to be published in, too. Unset: the model's."""
    resources: Resources = Resources()
    kv_cache: str = "512Mi"
    """KV budget of one pod, a quantity of bytes."""
    layer_group: Annotated[str, Meta(pattern="^(auto|native|llama|transformers|sleep)$")] = "auto"
    sleep_seconds: Seconds | list[Seconds] | None = None
    """With the layer group `sleep`: seconds a pass takes, for all stages or one number for each."""
    sleep_pass_times: PassTimes | list[PassTimes] | None = None
    """Instead, of a device that is emulated: for all stages or one for each."""
    sleep_bytes_per_second: Positive | None = None
    """How fast weights would come to such a device: a pod's start waits for them. Unset: not at all."""
    device: Annotated[str, Meta(pattern="^(auto|cpu|cuda)$")] = "auto"
    threads: Natural = 0
    busy_threads: Positive | None = None
    """For stages in fp32 that share the cores of one machine: threads of a pass while it is busy. Unset: as `threads`."""
    max_merge: Positive | None = None
    idle_sequence_seconds: Seconds | None = None
    timeout_seconds: Annotated[int, Meta(ge=1, le=600)] = 600
    """Also the grace that a leaving pod gets."""
    progress_deadline_seconds: Positive = 600
    """How long weights may take to arrive before the revision counts as failed."""
    weights_cache: Annotated[str, Meta(pattern="^/")] | None = None
    """Folder of an emptyDir for verified weights: helps restarts of a container, not new pods."""
    weights_cache_size: str = "2Gi"
    service_account: str | None = None
    """As whom its pods run, such as one that the store knows (workload identity). Unset: the namespace's default."""
    pod: Pod = Pod()
    autoscaling: Autoscaling = Autoscaling()


class Gateway(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The one function that clients talk to. Settings left out are the function's own defaults."""

    resources: GatewayResources = GatewayResources()
    micro_batch_sequences: Positive | None = None
    stages_at_once: Positive | None = None
    """How many stages can compute at the same time, where they share cores. Unset: all."""
    chunk_tokens: Positive | None = None
    draft_tokens: Natural | None = None
    """Most tokens that are drafted for a row of a step. 0: nothing is drafted."""
    prefix_sharing: Annotated[str, Meta(pattern="^(pipeline|client|off)$")] | None = None
    """Who finds the keys and values that a prompt left. Unset: client where there are API keys, else pipeline."""
    tool_parser: Literal["hermes", "llama3_json", "mistral"] | None = None
    """How the model writes calls of tools. Unset: as its chat template shows."""
    queue_limit: Positive | None = None
    cold_start_timeout_seconds: Seconds | None = None
    request_timeout_seconds: Seconds | None = None
    step_timeout_seconds: Seconds | None = None
    timeout_seconds: Annotated[int, Meta(ge=1, le=600)] = 600
    api_keys_secret: str | Annotated[list[str], Meta(min_length=1)] | None = None
    """Secret, or several, whose key `api-keys` holds API keys (`python -m knative keys`). Unset: open to whoever reaches it."""
    client_requests_per_minute: Positive | None = None
    """Of each client, by key or address, at each gateway pod; so are the next two. Unset: no limit."""
    client_tokens_per_minute: Positive | None = None
    client_concurrent: Positive | None = None
    client_max_tokens: Positive | None = None
    """Of one answer, which ends there. Unset: the rest of the context."""
    limits_secret: str | None = None
    """Secret whose key `url` is a Redis, in which all gateway pods count together. Unset: each for itself."""
    cors_origins: list[str] | None = None
    """Origins whose pages browsers let ask, or `*`. Unset: none."""
    access_log: Annotated[str, Meta(pattern="^(on|off|prompts)$")] | None = None
    """A line of JSON for each request; `prompts`: with what was asked and answered. Unset: on."""
    proxies: Annotated[int, Meta(ge=0, le=16)] | None = None
    """That every request passes and that add to X-Forwarded-For, queue-proxy among them. Unset: that one."""
    page: Annotated[str, Meta(pattern="^(on|off)$")] | None = None
    """Whether `GET /` is a page that chats and shows the pipeline. Unset: on."""
    service_account: str | None = None
    """Needs the right to watch EndpointSlices. Unset: `{name}-gateway`, rendered with its Role."""
    pod_network: str | None = None
    """CIDRs of the cluster's pods, separated by commas: only addresses inside are followed. Unset: private addresses."""
    pod_port: Annotated[int, Meta(ge=1, le=65535)] = 8012
    max_unavailable: Positive | None = None
    """Pods that an eviction, as of a node that is drained, may take at the same time (a PodDisruptionBudget). Unset: all."""
    pod: Pod = Pod()
    autoscaling: GatewayAutoscaling = GatewayAutoscaling()

    @property
    def api_keys_secrets(self) -> tuple[str, ...]:
        secrets = self.api_keys_secret
        return () if secrets is None else (secrets,) if isinstance(secrets, str) else tuple(secrets)


class Store(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The S3-compatible store that pods read weights from."""

    endpoint: Annotated[str, Meta(pattern="^https?://")]
    bucket: str = "lamina"
    region: str = "us-east-1"
    secret: str | None = "lamina-store"
    """Secret with the keys AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if need be, AWS_SESSION_TOKEN. null: no Secret; pods
    are who their ServiceAccounts are (`stage.service_account`, `gateway.service_account`)."""
    web_identity: WebIdentity | None = None
    """With `secret: null`. Unset, something in the cluster brings the token, as EKS's webhook does for annotated accounts."""

    def __post_init__(self) -> None:
        if self.web_identity is not None and self.secret is not None:
            raise SpecError("$.store.web_identity: pods that have keys need none; set $.store.secret to null")


class Network(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Namespaces from which pods may be reached, besides Knative's own."""

    policies: bool = True
    """Whether NetworkPolicies are rendered. A cluster whose network does not know them ignores them."""
    ingress_namespace: str = "kourier-system"
    monitoring_namespace: str = "monitoring"


class Channel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What events wait in between the steps of the Sequence."""

    api_version: str = "messaging.knative.dev/v1"
    kind: str = "InMemoryChannel"
    """Keeps nothing over a restart of its pod. Name a durable one for what must not be lost."""


class Eventing(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Broker with Triggers, and a Sequence that scores texts. Whoever reaches the Broker may ask: events carry no API key."""

    dead_letter_sink: str
    """Where an event goes that cannot be delivered: a URL, or the name of a Knative Service of the same namespace."""
    reply_sink: str | None = None
    """Where responses go, likewise. Unset: whoever wants them makes a Trigger."""
    broker_class: str = "MTChannelBasedBroker"
    channel: Channel = Channel()
    retry: Annotated[int, Meta(ge=0, le=100)] = 5
    backoff_policy: Annotated[str, Meta(pattern="^(exponential|linear)$")] = "exponential"
    backoff_seconds: Annotated[float, Meta(gt=0, le=3600)] = 1
    timeout_seconds: Annotated[int, Meta(ge=1, le=600)] = 600
    """Of one delivery: as long as the longest answer, cold start included."""


class Monitoring(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PodMonitor and PrometheusRule; needs the Prometheus operator."""

    labels: dict[str, str] = {}
    """On both objects: what the Prometheus selects by, such as `release: prometheus`."""
    interval_seconds: Annotated[int, Meta(ge=1, le=300)] = 15
    queue_proxy_metrics: bool = False
    """Scrapes queue-proxy too, which listens only once config-observability has `request-metrics-protocol: prometheus`."""
    alerts: bool = True


class PipelineSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pipeline. Either `stages` (cut evenly) or `cut` (`0:10,10:20,20:30`)."""

    name: str
    namespace: str = "default"
    model: Model
    stages: Positive | None = None
    cut: str | None = None
    wire_dtype: Literal["int8"] | None = None
    """In which hidden states travel between stages: in 8 bits, by which answers may differ. Unset: as they are computed."""
    image: str
    pipeline_token_secret: str | None = None
    """Secret whose key `token` is the bearer token between gateway and stages. Unset: `{name}-pipeline`, made by `deploy`."""
    stage: Stage = Stage()
    stage_overrides: list[dict[str, Any]] = []
    """Pieces that differ: `stage: 1` or `layers: 10:20`, and fields of `stage` that are otherwise there."""
    gateway: Gateway = Gateway()
    store: Store
    kv_store: KVStore | None = None
    """Unset: what no pod holds any more is computed again."""
    network: Network = Network()
    eventing: Eventing | None = None
    """Unset: the pipeline is asked over HTTP only."""
    monitoring: Monitoring | None = None
    """Unset: whoever scrapes the pods brings their own objects."""
    tracing: Tracing | None = None
    """Unset: traceparent is passed on, nothing is recorded."""
    log_level: Annotated[str, Meta(pattern="^(debug|info|warning|error)$")] = "info"

    def __post_init__(self) -> None:
        _check_label("$.name", self.name, MAX_NAME if self.eventing is None else MAX_NAME_WITH_EVENTING)
        _check_label("$.namespace", self.namespace, 63)
        _check_choice("$.model.dtype", self.model.dtype, DTYPES)
        _check_stage("$.stage", self.stage, self.model.dtype)
        for number, override in enumerate(self.stage_overrides):
            _check_stage(f"{PATH}[{number}]", changed(self.stage, override, number), self.model.dtype)
        for dtype in self.model.digests:
            _check_choice("$.model.digests", dtype, DTYPES)
        _check_autoscaling("$.gateway.autoscaling", self.gateway.autoscaling)
        _check_quantity("$.gateway.resources.cpu", self.gateway.resources.cpu)
        _check_quantity("$.gateway.resources.memory", self.gateway.resources.memory)
        check_pod("$.gateway.pod", self.gateway.pod)
        _check_networks(self.gateway.pod_network)
        if self.eventing is not None:
            _check_sinks(self.eventing)
        if self.kv_store is not None:
            _check_quantity("$.kv_store.max_bytes", self.kv_store.max_bytes)
            _check_quantity("$.kv_store.write_rate", self.kv_store.write_rate or "1")
        if (self.stages is None) == (self.cut is None):
            raise SpecError(f"$.stages, $.cut: exactly one of them is needed, seen {self.stages!r} and {self.cut!r}")
        if self.cut is not None:
            parse_cut(self.cut, "$.cut")

    @property
    def token_secret(self) -> str:
        return self.pipeline_token_secret or f"{self.name}-pipeline"

    def stages_of(self, cut: Cut) -> tuple[Stage, ...]:
        """What each stage of the cut gets. Raises SpecError where an override is for no stage of it."""
        return overridden(self.stage, self.stage_overrides, cut)

    def dtypes_of(self, cut: Cut) -> tuple[str, ...]:
        """In which each stage of the cut computes."""
        return tuple(stage.dtype or self.model.dtype for stage in self.stages_of(cut))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """All that some stage may compute in, the model's first: what has to be published."""
        own = [self.stage.dtype, *(override.get("dtype") for override in self.stage_overrides)]
        return tuple(dict.fromkeys([self.model.dtype, *(dtype for dtype in own if dtype)]))


def _check_stage(path: str, stage: Stage, model_dtype: str) -> None:
    dtype = stage.dtype or model_dtype
    _check_choice(f"{path}.dtype", dtype, DTYPES)
    if dtype != model_dtype and not {dtype, model_dtype} <= MIXABLE_DTYPES:
        raise SpecError(
            f"{path}.dtype: {dtype} does not go with $.model.dtype {model_dtype}, whose hidden states travel otherwise; "
            f"{', '.join(sorted(MIXABLE_DTYPES))} go together"
        )
    _check_autoscaling(f"{path}.autoscaling", stage.autoscaling)
    _check_quantity(f"{path}.resources.cpu", stage.resources.cpu)
    _check_quantity(f"{path}.resources.memory", stage.resources.memory)
    _check_quantity(f"{path}.kv_cache", stage.kv_cache)
    _check_quantity(f"{path}.weights_cache_size", stage.weights_cache_size)
    check_pod(f"{path}.pod", stage.pod)
    if stage.device == "cuda" and dtype in ("int8", "q4"):
        raise SpecError(f"{path}.device: 'cuda' does not run dtype {dtype}; use auto or cpu, or another dtype")
    if stage.layer_group == "transformers" and dtype in ("int8", "q4"):
        raise SpecError(f"{path}.layer_group: 'transformers' does not run dtype {dtype}; use auto, or another dtype")


def _check_quantity(path: str, text: str) -> None:
    try:
        quantity(text)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


def _check_networks(text: str | None) -> None:
    try:
        for part in (text or "").split(",") if text else ():
            ipaddress.ip_network(part.strip())
    except ValueError as error:
        raise SpecError(f"$.gateway.pod_network: {text!r} is not networks such as 10.244.0.0/16 ({error})") from error


def _check_label(path: str, value: str, longest: int) -> None:
    if not _LABEL.fullmatch(value) or len(value) > longest:
        raise SpecError(
            f"{path}: {value!r} is no DNS label (lower-case letters, digits, '-', a letter first, at most {longest} characters)"
        )


def _check_choice(path: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SpecError(f"{path}: {value!r} is none of {', '.join(choices)}")


def _check_sinks(eventing: Eventing) -> None:
    for path, sink in (("dead_letter_sink", eventing.dead_letter_sink), ("reply_sink", eventing.reply_sink)):
        if sink is not None and not re.match("https?://[^/]", sink):
            if "/" in sink or ":" in sink:
                raise SpecError(f"$.eventing.{path}: {sink!r} is neither a URL that begins with http nor the name of a Service")
            _check_label(f"$.eventing.{path}", sink, 63)


def _check_autoscaling(path: str, scaling: Autoscaling) -> None:
    if scaling.min_scale > scaling.max_scale:
        raise SpecError(f"{path}.min_scale: {scaling.min_scale} is above max_scale {scaling.max_scale}")
    limit = scaling.container_concurrency
    if scaling.autoscaler_class == "kpa" and limit and (scaling.target or 0) > limit:
        raise SpecError(f"{path}.target: {scaling.target} is above container_concurrency {limit} and would never be reached")
    if scaling.autoscaler_class == "hpa" and scaling.min_scale == 0:
        raise SpecError(f"{path}.min_scale: 0, but the class hpa cannot scale to zero; use 1 or the class kpa")


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number: `500m` → 0.5, `512Mi` → 536870912. Raises SpecError."""
    try:
        amount = parse_quantity(text)
    except ValueError as error:
        raise SpecError(str(error)) from error
    if amount < 0:
        raise SpecError(f"{text!r} is less than nothing")
    return float(amount)
