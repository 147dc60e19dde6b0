"""The configuration of a function: every key of its environment, with parser, meaning and default.

It is read once, at the start.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, Final, Literal

from eventing.wire.events import MAX_DRAFT_TOKENS, StageWeights
from functions.configuration import parsers
from functions.configuration.api_keys import ApiKey
from functions.configuration.objective import Objective
from functions.configuration.parsers import LayerRange
from functions.configuration.pass_times import PassTimes
from functions.configuration.settings import REQUIRED, ConfigError, Key, keys, optional, read, setting
from storage.store.settings import StoreSettings

if TYPE_CHECKING:
    from eventing.http.pod_tls import PodTLS

ROLE_KEY: Final = "LAMINA_ROLE"
FLEET_LABEL: Final = "lamina.dev/fleet"  # of a fleet's members' ConfigMaps and pods
PERCENT: Final = "lamina.dev/percent"  # annotation of a canary's ConfigMap: its share of the member's requests
_PREFIX: Final = "LAMINA_"
_ROLE = Key(
    ROLE_KEY,
    parsers.one_of("stage", "gateway", "fleet"),
    "role of this function: stage, gateway, or gateway of a fleet",
    REQUIRED,
    False,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig(StoreSettings):
    """The S3-compatible store of models."""

    endpoint_url: str = setting("LAMINA_STORE_ENDPOINT", parsers.url, "URL of the S3-compatible store")
    bucket: str = setting("LAMINA_STORE_BUCKET", str, "bucket that holds the models")
    region: str = setting("LAMINA_STORE_REGION", str, "region that requests are signed for", "us-east-1")
    access_key_id: str | None = optional("AWS_ACCESS_KEY_ID", str, "access key of the store")
    secret_access_key: str | None = optional("AWS_SECRET_ACCESS_KEY", str, "secret key of the store", secret=True)
    session_token: str | None = optional("AWS_SESSION_TOKEN", str, "token of temporary keys", secret=True)
    web_identity_token_file: str | None = optional(
        "AWS_WEB_IDENTITY_TOKEN_FILE", str, "instead of keys: file with a token that is exchanged for some"
    )
    role_arn: str | None = optional("AWS_ROLE_ARN", str, "role that the token is exchanged for")
    sts_endpoint: str | None = optional(
        "AWS_ENDPOINT_URL_STS", parsers.url, "URL that exchanges the token; unset: AWS's own in LAMINA_STORE_REGION"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class KVStoreConfig:
    """The S3-compatible store that keeps keys and values of idle conversations after their pod has ended."""

    place: tuple[str, str] | None = optional(
        "LAMINA_KV_STORE",
        parsers.bucket_and_prefix,
        "BUCKET/PREFIX for keys and values of idle conversations when their pod ends; unset: they are dropped",
    )
    endpoint_url: str | None = optional(
        "LAMINA_KV_STORE_ENDPOINT", parsers.url, "URL of that store; unset: LAMINA_STORE_ENDPOINT"
    )
    access_key_id: str | None = optional(
        "LAMINA_KV_STORE_ACCESS_KEY_ID", str, "access key that may write there; unset: as for models"
    )
    secret_access_key: str | None = optional("LAMINA_KV_STORE_SECRET_ACCESS_KEY", str, "its secret key", secret=True)
    key: bytes | None = optional(
        "LAMINA_KV_KEY", parsers.key_256, "key that encrypts what is kept there: 64 hexadecimal digits", secret=True
    )
    max_bytes: int = setting(
        "LAMINA_KV_STORE_BYTES", parsers.integer(1), "most bytes of this stage there; the oldest are deleted", str(10 * 2**30)
    )
    max_age_seconds: float = setting(
        "LAMINA_KV_STORE_AGE_SECONDS", parsers.seconds, "older entries are deleted", str(7 * 86_400)
    )
    bytes_per_second: int = setting(
        "LAMINA_KV_STORE_BYTES_PER_SECOND", parsers.integer(1), "most bytes that a pod writes in a second", str(64 * 2**20)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TLSConfig:
    """Configuration of TLS between pods. Without a CA, pods reach each other by plain HTTP."""

    ca: str | None = optional(
        "LAMINA_TLS_CA",
        str,
        "PEM file with CA certificates: pods of stages are reached by https only, and must show one of that CA's certificates; "
        "unset: plain HTTP",
        closes=True,
    )
    name: str | None = optional(
        "LAMINA_TLS_NAME", str, "DNS name in the certificates of all pods, such as Knative's kn-user-NAMESPACE", closes=True
    )
    certificate: str | None = optional(
        "LAMINA_TLS_CERTIFICATE",
        str,
        "PEM file with this pod's own certificate, for mutual TLS; it is read again when it changes",
        closes=True,
    )
    key: str | None = optional("LAMINA_TLS_KEY", str, "PEM file with its key", closes=True)

    def load(self) -> "PodTLS | None":
        """Reads the certificates in these files. Returns None if pods use no TLS.

        Raises ConfigError for files that cannot be used.
        """
        from eventing.http.pod_tls import PodTLS, UnusableTLSFiles

        if self.ca is None or self.name is None:
            return None
        try:
            return PodTLS(self.ca, self.name, self.certificate, self.key)
        except UnusableTLSFiles as error:
            raise ConfigError([f"TLS between pods: {error}"]) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessConfig:
    """Configuration that every function has: its ports, the store, the network of pods."""

    port: int = setting("PORT", parsers.integer(0, 65535), "port for requests, set by Knative; 0: a free port", "8080")
    service: str | None = optional("K_SERVICE", str, "name of the function's Knative Service, set by Knative")
    listen: str = setting(
        "LAMINA_LISTEN",
        parsers.address,
        "address to listen on: 0.0.0.0 as Knative requires it, :: for IPv6 too, 127.0.0.1 on one machine",
        "0.0.0.0",
    )
    metrics_port: int = setting(
        "LAMINA_METRICS_PORT",
        parsers.integer(0, 65535),
        "port of /metrics and of the details of /readyz, which clients of PORT do not get; 0: a free port",
        "9464",
    )
    pipeline_token: str = setting("LAMINA_PIPELINE_TOKEN", str, "bearer token between gateway and stages", secret=True)
    store: StoreConfig
    pod_network: tuple[IPv4Network | IPv6Network, ...] = setting(
        "LAMINA_POD_NETWORK",
        parsers.networks,
        "networks of pods, separated by commas; other addresses are not used; default: private addresses",
        "10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,100.64.0.0/10,fc00::/7",
    )
    pod_port: int = setting(
        "LAMINA_POD_PORT", parsers.integer(0, 65535), "port of pods; others are not used; 0: the EndpointSlice's own", "8012"
    )
    tls: TLSConfig
    traces_endpoint: str | None = optional(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        parsers.url,
        "URL for traces, by OTLP over HTTP; unset: no traces. OpenTelemetry reads its other OTEL_* keys itself",
    )
    log_level: str = setting(
        "LAMINA_LOG_LEVEL", parsers.one_of("debug", "info", "warning", "error"), "least severe level that is logged", "info"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CommonConfig(ProcessConfig):
    """Configuration of a pipeline, which its stages and gateway share."""

    pipeline: str = setting("LAMINA_PIPELINE", parsers.fingerprint, "fingerprint of the pipeline, which every event has")
    model: str = setting("LAMINA_MODEL", str, "name of the model in the store")
    dtype: str = setting(
        "LAMINA_DTYPE",
        parsers.one_of("float32", "bfloat16", "float16", "int8", "q4", "kept"),
        "dtype of the publication in the store",
    )
    cut: tuple[LayerRange, ...] = setting("LAMINA_CUT", parsers.cut, "all layer groups, such as 0:10,10:20,20:30")
    weights: tuple[StageWeights, ...] | None = optional(
        "LAMINA_WEIGHTS",
        parsers.weights,
        "if groups compute in different dtypes: DTYPE=DIGEST of each group's publication; unset: all in LAMINA_DTYPE",
    )
    wire_dtype: str | None = optional(
        "LAMINA_WIRE_DTYPE",
        parsers.one_of("int8"),
        "int8: hidden states are sent in 8 bits, with a scale for each token; answers may differ. Unset: as they are computed",
    )
    kv_dtype: Literal["int8"] | None = optional(
        "LAMINA_KV_DTYPE",
        parsers.one_of("int8"),
        "int8: keys and values are kept in 8 bits, with a scale for each token and head; answers may differ. Unset: in bf16, "
        "with float32 weights in float32",
    )
    adapters: int = setting(
        "LAMINA_ADAPTERS",
        parsers.integer(0, 1024),
        "most adapters (LoRA) that a stage keeps in memory; 0: none are served",
        "0",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig(CommonConfig):
    layers: LayerRange = setting("LAMINA_LAYERS", parsers.layers, "this stage's group of the cut, such as 10:20")  # noqa: RUF009
    second_pipeline_token: str | None = optional(
        "LAMINA_SECOND_PIPELINE_TOKEN", str, "accepted beside the other, while the token is rotated", secret=True
    )
    tls_port: int | None = optional(
        "LAMINA_TLS_PORT",
        parsers.integer(1, 65535),
        "port at which the stage takes TLS connections from pods that show a certificate, and passes them to queue-proxy; "
        "unset: none, queue-proxy has such a port itself",
    )
    queue_proxy_port: int = setting(
        "LAMINA_QUEUE_PROXY_PORT", parsers.integer(1, 65535), "port of the pod's queue-proxy, for LAMINA_TLS_PORT", "8012"
    )
    layer_group: str = setting(
        "LAMINA_LAYER_GROUP",
        parsers.one_of("auto", "native", "llama", "transformers", "sleep"),
        "runtime of the layers: native (C, on CPUs), llama (torch) or transformers; auto: the first of these that can; sleep: "
        "waits instead of computing (for benchmarks)",
        "auto",
    )
    sleep_seconds: float = setting("LAMINA_SLEEP_SECONDS", parsers.seconds, "with sleep, duration of a forward pass", "0.03")
    sleep_pass_times: PassTimes | None = optional(  # noqa: RUF009
        "LAMINA_SLEEP_PASS_TIMES",
        parsers.json_object(PassTimes, f"with any of {', '.join(PassTimes.__struct_fields__)}, numbers from 0 to 3600"),
        "instead: durations of an emulated device, as JSON (functions/configuration/pass_times.py)",
    )
    sleep_bytes_per_second: int | None = optional(
        "LAMINA_SLEEP_BYTES_PER_SECOND",
        parsers.integer(1),
        "with sleep, speed of a pod's link: the start waits for its weights' bytes ÷ this, KV is handed over at this speed; "
        "unset: the start does not wait, and no KV is handed over",
    )
    device: str = setting(
        "LAMINA_DEVICE",
        parsers.one_of("auto", "cpu", "cuda"),
        "device of the layers; auto: a GPU if there is one that runs the dtype",
        "auto",
    )
    threads: int = setting("LAMINA_THREADS", parsers.integer(0, 1024), "threads of a forward pass; 0: the CPU limit", "0")
    busy_threads: int = setting(
        "LAMINA_BUSY_THREADS",
        parsers.integer(0, 1024),
        "threads of a forward pass of torch's operators (fp32) while the stage is busy more than half of the time, for stages "
        "that share cores; 0: LAMINA_THREADS",
        "0",
    )
    kv_cache_bytes: int = setting("LAMINA_KV_CACHE_BYTES", parsers.integer(1), "memory for keys and values", str(2**30))
    adapter_rank: int = setting(
        "LAMINA_ADAPTER_RANK", parsers.integer(1, 256), "largest rank of adapters; memory is planned for it", "16"
    )
    max_merge: int = setting("LAMINA_MAX_MERGE", parsers.integer(1, 1024), "most events merged into one forward pass", "4")
    max_memory_waiters: int = setting(
        "LAMINA_MAX_MEMORY_WAITERS",
        parsers.integer(0, 1024),
        "most requests that wait here for memory, so that the autoscaler counts them; each takes one of containerConcurrency",
        "2",
    )
    idle_sequence_seconds: float = setting(
        "LAMINA_IDLE_SEQUENCE_SECONDS", parsers.seconds, "a sequence without events for so long is released", "600"
    )
    kv_store: KVStoreConfig
    weights_cache: str | None = optional(
        "LAMINA_WEIGHTS_CACHE", str, "folder of verified weights that outlives the pod; unset: none"
    )
    weights_cache_bytes: int = setting(
        "LAMINA_WEIGHTS_CACHE_BYTES", parsers.integer(1), "most bytes in this folder", str(20 * 2**30)
    )
    weights_budget_bytes: int | None = optional(
        "LAMINA_WEIGHTS_BUDGET_BYTES",
        parsers.integer(1),
        "most memory for weights: experts that were used the longest ago are dropped, and read from LAMINA_WEIGHTS_CACHE when "
        "they are used again; unset: all stay",
    )

    @property
    def pipeline_tokens(self) -> tuple[str, ...]:
        """The bearer tokens that the stage accepts: two while the token is rotated, otherwise one."""
        return (self.pipeline_token, *([self.second_pipeline_token] if self.second_pipeline_token else []))


@dataclass(frozen=True, kw_only=True)
class ClientsConfig:
    """Configuration of a process that clients connect to: the gateway of a pipeline or of a fleet."""

    limits_store: str | None = optional(
        "LAMINA_LIMITS_STORE",
        parsers.limits_store,
        "URL of a Redis, redis://HOST:PORT/DB, in which all gateways count requests and tokens per minute; unset: each counts "
        "alone",
        secret=True,
    )
    cors_origins: tuple[str, ...] | None = optional(
        "LAMINA_CORS_ORIGINS",
        parsers.origins,
        "origins of pages that may send requests from browsers, such as https://chat.example, separated by commas, or *; "
        "unset: none",
    )
    hosts: tuple[str, ...] | None = optional(
        "LAMINA_HOSTS",
        parsers.hosts,
        "more names by which a gateway without API keys is asked, such as chat.example or *.example, separated by commas, or * "
        "for any; IP addresses, names of one label, cluster-local names and the Knative Service's URL need not be listed",
    )
    access_log: str = setting(
        "LAMINA_ACCESS_LOG",
        parsers.one_of("on", "off", "prompts"),
        "a line of JSON for each request, with tokens, times and status; prompts: with prompt and answer, too",
        "on",
    )
    proxies: int = setting(
        "LAMINA_PROXIES",
        parsers.integer(0, 16),
        "number of proxies that every request passes, each of which appends to X-Forwarded-For; the first one's entry "
        "identifies a client without a key; 0: the header is ignored",
        "1",
    )
    drain_seconds: float = setting(
        "LAMINA_DRAIN_SECONDS",
        parsers.seconds,
        "how long answers may go on after SIGTERM; those that have not ended then fail with not-ready",
        "540",
    )
    kubernetes_api: str | None = optional(
        "LAMINA_KUBERNETES_API",
        parsers.kubernetes_api,
        "URL of the API that serves EndpointSlices; cluster: by the pod's ServiceAccount; unset: no watch",
    )
    page: str = setting(
        "LAMINA_PAGE", parsers.one_of("on", "off"), "on: `GET /` is a page that chats and shows the pipeline", "on"
    )
    namespace: str = setting("LAMINA_NAMESPACE", str, "namespace of the stages", "default")
    own_url: str | None = optional(
        "LAMINA_OWN_URL",
        parsers.url,
        "URL of the gateway's own Service: while batches are open, a request to it keeps the gateway from scaling to zero",
    )
    sink: str | None = optional(
        "K_SINK",
        parsers.url,
        "URL that gets the results of batches which events began, set by a SinkBinding; unset: no such events",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig(CommonConfig, ClientsConfig):
    stages: tuple[tuple[LayerRange, str], ...] = setting(
        "LAMINA_STAGES", parsers.stages, "URL of each group's Service: 0:10=http://…,10:20=http://…"
    )
    api_keys: tuple[ApiKey, ...] | None = optional(
        "LAMINA_API_KEYS",
        parsers.keys,
        "bearer keys of clients, or sha256: and a key's SHA-256, separated by commas, each followed by its name and limits "
        "(functions/configuration/api_keys.py); unset, and no files: open to all",
        secret=True,
        closes=True,
    )
    api_key_files: tuple[str, ...] | None = optional(
        "LAMINA_API_KEY_FILES",
        parsers.paths,
        "files of such keys, separated by commas; read again when they change",
        closes=True,
    )
    client_requests_per_minute: int = setting(
        "LAMINA_CLIENT_REQUESTS_PER_MINUTE",
        parsers.integer(0, 10**9),
        "most requests of one client at this gateway; 0: no limit",
        "0",
    )
    client_tokens_per_minute: int = setting(
        "LAMINA_CLIENT_TOKENS_PER_MINUTE",
        parsers.integer(0, 10**12),
        "most tokens of one client at this gateway, in prompts and answers; an answer that has begun is finished; 0: no limit",
        "0",
    )
    client_tokens_per_day: int = setting(
        "LAMINA_CLIENT_TOKENS_PER_DAY",
        parsers.integer(0, 10**12),
        "most tokens of one client in a calendar day (UTC), at all gateways that use LAMINA_LIMITS_STORE; 0: no limit",
        "0",
    )
    client_tokens_per_month: int = setting(
        "LAMINA_CLIENT_TOKENS_PER_MONTH", parsers.integer(0, 10**12), "the same for a calendar month", "0"
    )
    client_concurrent: int = setting(
        "LAMINA_CLIENT_CONCURRENT",
        parsers.integer(0, 10**6),
        "most concurrent answers of one client at this gateway; 0: no limit",
        "0",
    )
    client_max_tokens: int = setting(
        "LAMINA_CLIENT_MAX_TOKENS", parsers.integer(0, 10**9), "most tokens of one answer; 0: no limit", "0"
    )
    tool_parser: str = setting(
        "LAMINA_TOOL_PARSER",
        parsers.one_of("auto", "hermes", "llama3_json", "mistral"),
        "format of the model's tool calls; auto: as its chat template shows",
        "auto",
    )
    parse_control_tokens: str = setting(
        "LAMINA_PARSE_CONTROL_TOKENS",
        parsers.one_of("on", "off"),
        "on: text of messages and tools that spells a control token, such as <|im_end|>, becomes the token; off: it stays text",
        "off",
    )
    scores: str = setting(
        "LAMINA_SCORES",
        parsers.one_of("on", "off"),
        "on: the first step of a Sequence that scores texts. It replies with signed events, so clients must not reach it",
        "off",
    )
    queue_limit: int = setting(
        "LAMINA_QUEUE_LIMIT", parsers.integer(0, 100_000), "requests that may wait; more are refused with 429", "256"
    )
    keep_alive_seconds: float = setting(
        "LAMINA_KEEP_ALIVE_SECONDS",
        parsers.seconds_or_zero,
        "silence after which a stream sends a comment, so that proxies and clients do not take it for dead; 0: never",
        "10",
    )
    chunk_tokens: int = setting(
        "LAMINA_CHUNK_TOKENS", parsers.integer(1, 65_536), "most prompt tokens of one sequence in one event", "256"
    )
    prompt_bytes: int = setting(
        "LAMINA_PROMPT_BYTES",
        parsers.integer(1, 2**40),
        "bytes of prompts' hidden states that may be on their way between stages at once; further chunks wait. The "
        "gateway needs a multiple of them as memory",
        "67108864",
    )
    micro_batch_sequences: int = setting(
        "LAMINA_MICRO_BATCH_SEQUENCES", parsers.integer(1, 1024), "most sequences in one micro-batch", "8"
    )
    stages_at_once: int = setting(
        "LAMINA_STAGES_AT_ONCE",
        parsers.integer(0, 1024),
        "stages that can compute at the same time, fewer than all if they share cores; 0: all",
        "0",
    )
    objective: Objective | None = optional(  # noqa: RUF009
        "LAMINA_OBJECTIVE",
        parsers.json_object(Objective, 'such as {"first_token_seconds": 2, "token_seconds": 0.2}'),
        "what answers shall keep, as JSON: first_token_seconds, token_seconds, share; unset: there is no objective",
    )
    draft_tokens: int = setting(
        "LAMINA_DRAFT_TOKENS",
        parsers.integer(0, MAX_DRAFT_TOKENS),
        "most draft tokens for a row of a step; fewer if they do not pay; 0: no speculation",
        "16",
    )
    prefix_sharing: str = setting(
        "LAMINA_PREFIX_SHARING",
        parsers.one_of("auto", "pipeline", "client", "request", "off"),
        "which requests may reuse a prompt's keys and values: all of the pipeline, those with the same API key (client), those "
        "with the same cache_salt (request), none (off); auto: client if there are API keys, else request",
        "auto",
    )
    cold_start_timeout_seconds: float = setting(
        "LAMINA_COLD_START_TIMEOUT_SECONDS", parsers.seconds, "longest wait of a request for sleeping stages", "300"
    )
    request_timeout_seconds: float = setting(
        "LAMINA_REQUEST_TIMEOUT_SECONDS", parsers.seconds, "longest duration of one answer", "600"
    )
    step_timeout_seconds: float = setting(
        "LAMINA_STEP_TIMEOUT_SECONDS", parsers.seconds, "longest stay of one event at a stage", "120"
    )
    stage_services: tuple[str, ...] | None = optional(
        "LAMINA_STAGE_SERVICES",
        parsers.services,
        "names of the stages' Knative Services, whose EndpointSlices are watched; unset: the first label of each URL's host",
    )
    stage_targets: tuple[float, ...] | None = optional(
        "LAMINA_STAGE_TARGETS",
        parsers.targets,
        "per stage, concurrency of a replica at which another is added, for the page; 0: scaled otherwise; unset: unknown",
    )
    jobs_store: tuple[str, str] | None = optional(
        "LAMINA_JOBS_STORE",
        parsers.bucket_and_prefix,
        "BUCKET/PREFIX for files and batches (/v1/files, /v1/batches), in the store of models, with its keys; unset: they are "
        "not served",
    )
    jobs_retention_seconds: int = setting(
        "LAMINA_JOBS_RETENTION_SECONDS",
        parsers.integer(0, 10**9),
        "age at which files and ended batches are deleted, unless a client says otherwise for a file; 0: they stay",
        "2592000",
    )

    @property
    def sharing(self) -> str:
        """Who may share entries of the prefix cache: `prefix_sharing`, with `auto` replaced.

        `auto` becomes `client` if there are API keys, otherwise `request`. A hit in the prefix cache shows in the response
        time, so clients that may be strangers to each other do not share by default. Without keys all clients may be strangers,
        since all behind an ingress may have one address.
        """
        if self.prefix_sharing != "auto":
            return self.prefix_sharing
        return "client" if self.has_keys else "request"

    @property
    def has_keys(self) -> bool:
        return self.api_keys is not None or self.api_key_files is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetConfig(ProcessConfig, ClientsConfig):
    """Configuration of a fleet's gateway.

    Each member's ConfigMap has the remaining keys of a gateway, for that member's pipeline.
    """

    fleet: str = setting("LAMINA_FLEET", str, "name of the fleet, in the label lamina.dev/fleet of its members' ConfigMaps")
    keys_folder: str | None = optional(
        "LAMINA_FLEET_KEYS",
        str,
        "folder with a file of API keys for each member, of its name; a member without one lets nobody in; unset: open to all",
        closes=True,
    )
    max_devices: int | None = optional(
        "LAMINA_FLEET_MAX_DEVICES",
        parsers.integer(1),
        "most pods of all members' stages together: members take turns; unset: no limit",
    )
    lease: str | None = optional(
        "LAMINA_FLEET_LEASE",
        str,
        "Lease in which all gateways of the fleet keep what they grant of max_devices; unset: this gateway is the only one",
    )
    memory_bytes: int = setting(
        "LAMINA_FLEET_MEMORY_BYTES",
        parsers.integer(1),
        "memory of the process beyond which members that are idle are given up, the least recently used first",
        str(384 * 2**20),
    )


Config = StageConfig | GatewayConfig | FleetConfig
_ROLES: Final[dict[str, type[Config]]] = {"stage": StageConfig, "gateway": GatewayConfig, "fleet": FleetConfig}


def read_config(environ: Mapping[str, str]) -> Config:
    """Reads the configuration for the role that the environment names.

    Raises ConfigError with one sentence for each wrong, missing or unknown key.
    """
    errors, known = list[str](), {key.name for key, _ in _all_keys()}
    for name in sorted(environ):
        if name.startswith(_PREFIX) and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            errors.append(f"{name} is not a known key; the nearest known one is {nearest[0]}")
    try:
        role = _ROLE.read(environ)
    except ValueError as error:
        raise ConfigError([*errors, str(error)]) from error
    for key, owners in _all_keys():
        if role not in owners and key.name in environ:
            errors.append(f"{key.name} is a key of the {' and the '.join(owners)}, and {ROLE_KEY} is {role}")
    try:
        config = read(_ROLES[role], environ)
    except ConfigError as error:
        raise ConfigError([*errors, *error.errors]) from error
    errors += _contradictions(config)
    if errors:
        raise ConfigError(errors)
    return config


def member_config(fleet: Mapping[str, str], member: Mapping[str, str]) -> GatewayConfig:
    """Reads the configuration of one member's part of a fleet's gateway.

    `fleet` is the environment of the process. `member` has the member's own keys, none of which concern process, store or
    clients. Raises ConfigError.
    """
    shared = {key.name for key, owners in _all_keys() if "fleet" in owners}
    own = {key.name for key, owners in _all_keys() if owners == ("fleet",)}
    errors = [f"{name} is the fleet's: a member cannot set it" for name in sorted(shared & member.keys())]
    environ = {name: value for name, value in fleet.items() if name not in own}
    try:
        config = read_config({**environ, **member, ROLE_KEY: "gateway"})
    except ConfigError as error:
        raise ConfigError([*errors, *error.errors]) from error
    if errors or not isinstance(config, GatewayConfig):
        raise ConfigError(errors)
    return config


def member_keys() -> frozenset[str]:
    """Returns the names of keys that each member of a fleet sets for itself. The fleet's own process does not read them."""
    return frozenset(key.name for key, owners in _all_keys() if "gateway" in owners and "fleet" not in owners)


def environment() -> Iterator[tuple[str, str, str, str]]:
    """Yields name, roles, default and meaning of every key.

    The default is `required` if the key must be set. It is empty if an unset key means None.
    """
    grouped: dict[tuple[str, ...], list[Key]] = {}
    for key, owners in _all_keys():
        grouped.setdefault(owners, []).append(key)
    for owners, group in grouped.items():
        roles = "all" if len(owners) == len(_ROLES) else ", ".join(owners)
        for key in group:
            yield key.name, roles, "required" if key.default == REQUIRED else key.default, key.meaning


def _all_keys() -> list[tuple[Key, tuple[str, ...]]]:
    found: dict[Key, list[str]] = {_ROLE: list(_ROLES)}
    for role, settings in _ROLES.items():
        for key in keys(settings):
            found.setdefault(key, []).append(role)
    return [(key, tuple(roles)) for key, roles in found.items()]


def _contradictions(config: Config) -> Iterator[str]:
    """Yields one error, a sentence, for each set of values that are valid alone but not together."""
    if config.store.web_identity_token_file is None:
        store_keys = {"AWS_ACCESS_KEY_ID": config.store.access_key_id, "AWS_SECRET_ACCESS_KEY": config.store.secret_access_key}
        for name, value in store_keys.items():
            if value is None:
                yield f"{name} is not set (the store needs keys, or AWS_WEB_IDENTITY_TOKEN_FILE to exchange a token for some)"
    if (config.tls.ca is None) != (config.tls.name is None):
        yield "LAMINA_TLS_CA and LAMINA_TLS_NAME belong together: set both, or none"
    if (config.tls.certificate is None) != (config.tls.key is None) or (config.tls.certificate and not config.tls.ca):
        yield "LAMINA_TLS_CERTIFICATE and LAMINA_TLS_KEY belong together and to LAMINA_TLS_CA: set all, or leave them out"
    if isinstance(config, StageConfig):
        yield from _stage_contradictions(config)
    elif isinstance(config, GatewayConfig):
        yield from _gateway_contradictions(config)
    elif config.kubernetes_api is None:
        yield "LAMINA_KUBERNETES_API is not set, and names a fleet's members and their pods"


def _stage_contradictions(config: StageConfig) -> Iterator[str]:
    kv_store = config.kv_store
    if config.tls_port is not None and config.tls.certificate is None:
        yield "LAMINA_TLS_PORT needs a certificate to show: set LAMINA_TLS_CERTIFICATE, or leave it out"
    if kv_store.place is not None and kv_store.key is None:
        yield "LAMINA_KV_KEY is not set, and LAMINA_KV_STORE keeps conversations of clients: give it 64 hexadecimal digits"
    if (kv_store.access_key_id is None) != (kv_store.secret_access_key is None):
        yield "LAMINA_KV_STORE_ACCESS_KEY_ID and LAMINA_KV_STORE_SECRET_ACCESS_KEY belong together: set both, or none"
    if config.layers not in config.cut:
        first, last = config.layers
        yield f"LAMINA_LAYERS: '{first}:{last}' is not allowed: one of the groups of LAMINA_CUT, {_ranges(config.cut)}"
    emulation = {
        "LAMINA_SLEEP_PASS_TIMES": config.sleep_pass_times,
        "LAMINA_SLEEP_BYTES_PER_SECOND": config.sleep_bytes_per_second,
    }
    for key, value in emulation.items():
        if value is not None and config.layer_group != "sleep":
            yield f"{key} emulates a device, and LAMINA_LAYER_GROUP is {config.layer_group}: leave it out, or say sleep"
    if config.device == "cuda" and config.dtype in ("int8", "q4"):
        yield (
            f"LAMINA_DEVICE: 'cuda' is not allowed with LAMINA_DTYPE {config.dtype}, which runs on CPUs: "
            "cpu, auto, or another dtype"
        )
    if config.layer_group == "transformers" and config.dtype in ("int8", "q4"):
        yield f"LAMINA_LAYER_GROUP: 'transformers' is not allowed with LAMINA_DTYPE {config.dtype}: auto, or another dtype"


def _gateway_contradictions(config: GatewayConfig) -> Iterator[str]:
    if config.tls.ca is not None and config.kubernetes_api is None:
        yield "LAMINA_KUBERNETES_API is not set, and LAMINA_TLS_CA allows requests to pods only, which it names"
    if config.prefix_sharing == "client" and not config.has_keys:
        yield "LAMINA_PREFIX_SHARING: client is not allowed without API keys, which tell clients apart: request, or pipeline"
    if (config.client_tokens_per_day or config.client_tokens_per_month) and config.limits_store is None:
        yield "LAMINA_LIMITS_STORE is not set, and counts LAMINA_CLIENT_TOKENS_PER_DAY and LAMINA_CLIENT_TOKENS_PER_MONTH"
    cut = _ranges(config.cut)
    named = tuple(group for group, _ in config.stages)
    if named != config.cut:
        yield f"LAMINA_STAGES: {_ranges(named)} is not allowed: the groups of LAMINA_CUT in their order, {cut}"
    if config.stage_services is not None and len(config.stage_services) != len(config.cut):
        names = ",".join(config.stage_services)
        yield f"LAMINA_STAGE_SERVICES: {names} is not allowed: one name for each group of LAMINA_CUT, {cut}"
    if config.stage_targets is not None and len(config.stage_targets) != len(config.cut):
        numbers = ",".join(f"{each:g}" for each in config.stage_targets)
        yield f"LAMINA_STAGE_TARGETS: {numbers} is not allowed: one number for each group of LAMINA_CUT, {cut}"


def _ranges(groups: tuple[LayerRange, ...]) -> str:
    return ",".join(f"{first}:{last}" for first, last in groups)
