"""What a function is told by its environment: the only reader of it, and the only place of defaults."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from eventing.wire.events import MAX_DRAFT_TOKENS, Weights
from functions.configuration import parsers
from functions.configuration.api_keys import ApiKey
from functions.configuration.parsers import LayerRange
from functions.configuration.pass_times import PassTimes, parse_pass_times
from functions.configuration.settings import REQUIRED, ConfigError, Key, keys, read, setting, unknown_keys
from functions.configuration.store_config import KVStoreConfig, StoreConfig

ROLE_KEY: Final = "LAMINA_ROLE"
_PREFIX: Final = "LAMINA_"
_ROLE = Key(ROLE_KEY, parsers.one_of("stage", "gateway"), "what this function is: stage or gateway", REQUIRED, False)


@dataclass(frozen=True, kw_only=True, slots=True)
class CommonConfig:
    """What stage and gateway are both told."""

    port: int = setting(
        "PORT", parsers.integer(0, 65535), "where to listen for requests; Knative sets it; 0: a free port", "8080"
    )
    listen: str = setting(
        "LAMINA_LISTEN",
        parsers.address,
        "address to listen at: 0.0.0.0 as Knative wants it, :: for IPv6 too, 127.0.0.1 on one machine",
        "0.0.0.0",
    )
    metrics_port: int = setting(
        "LAMINA_METRICS_PORT",
        parsers.integer(0, 65535),
        "where /metrics and the details of /readyz are, which clients of PORT do not get; 0: a free port",
        "9464",
    )
    pipeline: str = setting("LAMINA_PIPELINE", parsers.fingerprint, "fingerprint of the pipeline, which every event carries")
    pipeline_token: str = setting("LAMINA_PIPELINE_TOKEN", parsers.text, "bearer token between gateway and stages", secret=True)
    model: str = setting("LAMINA_MODEL", parsers.text, "name of the model in the store")
    dtype: str = setting(
        "LAMINA_DTYPE", parsers.one_of("float32", "bfloat16", "float16", "int8", "q4"), "dtype of the publication in the store"
    )
    cut: tuple[LayerRange, ...] = setting("LAMINA_CUT", parsers.cut, "all layer groups, such as 0:10,10:20,20:30")
    weights: tuple[Weights, ...] | None = setting(
        "LAMINA_WEIGHTS",
        parsers.weights,
        "where groups compute in dtypes of their own: DTYPE=DIGEST of each group's publication; unset: all in LAMINA_DTYPE",
        "",
    )
    wire_dtype: str | None = setting(
        "LAMINA_WIRE_DTYPE",
        parsers.one_of("int8"),
        "int8: hidden states travel in 8 bits, with a scale for each token; answers may differ. Unset: as they are computed",
        "",
    )
    store: StoreConfig
    pod_network: tuple[IPv4Network | IPv6Network, ...] = setting(
        "LAMINA_POD_NETWORK",
        parsers.networks,
        "only pod addresses in these networks, separated by commas, are followed; unless set: private addresses",
        "10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,100.64.0.0/10,fc00::/7",
    )
    pod_port: int = setting(
        "LAMINA_POD_PORT", parsers.integer(0, 65535), "only this port of a pod is followed; 0: the slice's own", "8012"
    )
    traces_endpoint: str | None = setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        parsers.url,
        "where traces go, by OTLP over HTTP; unset: nowhere. OpenTelemetry reads its other OTEL_* keys by itself",
        "",
    )
    log_level: str = setting(
        "LAMINA_LOG_LEVEL", parsers.one_of("debug", "info", "warning", "error"), "least severe messages that are logged", "info"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig(CommonConfig):
    """What one stage is told."""

    layers: LayerRange = setting("LAMINA_LAYERS", parsers.layers, "this stage's group of the cut, such as 10:20")  # noqa: RUF009
    second_pipeline_token: str | None = setting(
        "LAMINA_SECOND_PIPELINE_TOKEN", parsers.text, "taken as well as the other, while one is rotated", "", secret=True
    )
    layer_group: str = setting(
        "LAMINA_LAYER_GROUP",
        parsers.one_of("auto", "native", "llama", "transformers", "sleep"),
        "what runs the layers: native (C, on CPUs), llama (torch) or transformers; auto takes the first that can, sleep waits "
        "instead of computing (for benchmarks)",
        "auto",
    )
    sleep_seconds: float = setting("LAMINA_SLEEP_SECONDS", parsers.seconds, "how long a pass takes with sleep", "0.03")
    sleep_pass_times: PassTimes | None = setting(  # noqa: RUF009
        "LAMINA_SLEEP_PASS_TIMES",
        parse_pass_times,
        "instead: what a pass takes on a device that is emulated, as JSON (functions/configuration/pass_times.py)",
        "",
    )
    sleep_bytes_per_second: int | None = setting(
        "LAMINA_SLEEP_BYTES_PER_SECOND",
        parsers.integer(1),
        "with sleep, how fast the stage's weights would come: its start waits for bytes ÷ this; unset: not at all",
        "",
    )
    device: str = setting(
        "LAMINA_DEVICE",
        parsers.one_of("auto", "cpu", "cuda"),
        "where the layers run; auto: a GPU, if one is there and runs the dtype",
        "auto",
    )
    threads: int = setting("LAMINA_THREADS", parsers.integer(0, 1024), "threads of a pass; 0: as many as the CPU limit", "0")
    busy_threads: int = setting(
        "LAMINA_BUSY_THREADS",
        parsers.integer(0, 1024),
        "threads of a pass by torch's operators (fp32) while the stage is busy for more than half of the time, for stages that "
        "share cores; 0: the same",
        "0",
    )
    kv_cache_bytes: int = setting("LAMINA_KV_CACHE_BYTES", parsers.integer(1), "memory for keys and values", str(2**30))
    max_merge: int = setting("LAMINA_MAX_MERGE", parsers.integer(1, 1024), "most events merged into one pass", "4")
    most_awaiting_room: int = setting(
        "LAMINA_MOST_AWAITING_ROOM",
        parsers.integer(0, 1024),
        "requests at a time that may wait here until there is memory, so that the autoscaler counts them; each takes a place "
        "of containerConcurrency",
        "2",
    )
    idle_sequence_seconds: float = setting(
        "LAMINA_IDLE_SEQUENCE_SECONDS", parsers.seconds, "a sequence not heard of for so long is released", "600"
    )
    kv_store: KVStoreConfig
    weights_cache: str | None = setting(
        "LAMINA_WEIGHTS_CACHE", parsers.text, "folder of verified weights that outlives the pod; unset: none", ""
    )
    weights_cache_bytes: int = setting(
        "LAMINA_WEIGHTS_CACHE_BYTES", parsers.integer(1), "most bytes that this folder may hold", str(20 * 2**30)
    )

    @property
    def pipeline_tokens(self) -> tuple[str, ...]:
        """Any of which a stage takes."""
        return (self.pipeline_token, *([self.second_pipeline_token] if self.second_pipeline_token else []))

    @property
    def first(self) -> bool:
        return self.layers == self.cut[0]

    @property
    def last(self) -> bool:
        return self.layers == self.cut[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig(CommonConfig):
    """What a gateway is told."""

    stages: tuple[tuple[LayerRange, str], ...] = setting(
        "LAMINA_STAGES", parsers.stages, "URL of each group's Service: 0:10=http://…,10:20=http://…"
    )
    api_keys: tuple[ApiKey, ...] | None = setting(
        "LAMINA_API_KEYS",
        parsers.keys,
        "bearer keys of clients, or sha256: and a key's SHA-256, separated by commas, each with its name and limits "
        "(functions/configuration/api_keys.py) behind it; unset, and no files: open",
        "",
        secret=True,
        closes=True,
    )
    api_key_files: tuple[str, ...] | None = setting(
        "LAMINA_API_KEY_FILES",
        parsers.paths,
        "files of such keys, separated by commas, which are read again when they change",
        "",
        closes=True,
    )
    client_requests_per_minute: int = setting(
        "LAMINA_CLIENT_REQUESTS_PER_MINUTE", parsers.integer(0, 10**9), "most of one client at this gateway; 0: no limit", "0"
    )
    client_tokens_per_minute: int = setting(
        "LAMINA_CLIENT_TOKENS_PER_MINUTE",
        parsers.integer(0, 10**12),
        "most of one client at this gateway, of prompts and answers; an answer that has begun comes to its end; 0: no limit",
        "0",
    )
    client_concurrent: int = setting(
        "LAMINA_CLIENT_CONCURRENT",
        parsers.integer(0, 10**6),
        "most answers of a client at once at this gateway; 0: no limit",
        "0",
    )
    client_max_tokens: int = setting(
        "LAMINA_CLIENT_MAX_TOKENS", parsers.integer(0, 10**9), "most tokens of one answer, which ends there; 0: no limit", "0"
    )
    limits_store: str | None = setting(
        "LAMINA_LIMITS_STORE",
        parsers.limits_store,
        "URL of a Redis, redis://HOST:PORT/DB, in which all gateways count requests and tokens a minute together; unset: each "
        "counts for itself",
        "",
        secret=True,
    )
    cors_origins: tuple[str, ...] | None = setting(
        "LAMINA_CORS_ORIGINS",
        parsers.origins,
        "origins whose pages browsers let ask, such as https://chat.example, separated by commas, or *; unset: none",
        "",
    )
    access_log: str = setting(
        "LAMINA_ACCESS_LOG",
        parsers.one_of("on", "off", "prompts"),
        "a line of JSON for each request, with tokens, times and status; prompts: with what was asked and answered, too",
        "on",
    )
    proxies: int = setting(
        "LAMINA_PROXIES",
        parsers.integer(0, 16),
        "proxies that every request passes, each of which adds to X-Forwarded-For who spoke to it; the first one's entry tells "
        "clients without keys apart; 0: the header counts for nothing",
        "1",
    )
    tool_parser: str = setting(
        "LAMINA_TOOL_PARSER",
        parsers.one_of("auto", "hermes", "llama3_json", "mistral"),
        "how the model writes calls of tools; auto: as its chat template shows",
        "auto",
    )
    scores: str = setting(
        "LAMINA_SCORES",
        parsers.one_of("on", "off"),
        "whether it is the first step of a Sequence that scores texts, which hands out signed events; not where clients come",
        "off",
    )
    queue_limit: int = setting(
        "LAMINA_QUEUE_LIMIT", parsers.integer(0, 100_000), "requests that may wait; beyond it 429", "256"
    )
    chunk_tokens: int = setting(
        "LAMINA_CHUNK_TOKENS", parsers.integer(1, 65_536), "most prompt tokens of one sequence in one event", "256"
    )
    micro_batch_sequences: int = setting(
        "LAMINA_MICRO_BATCH_SEQUENCES", parsers.integer(1, 1024), "most sequences in one micro-batch", "8"
    )
    stages_at_once: int = setting(
        "LAMINA_STAGES_AT_ONCE",
        parsers.integer(0, 1024),
        "stages that can compute at the same time, fewer than all where they share cores; 0: all",
        "0",
    )
    draft_tokens: int = setting(
        "LAMINA_DRAFT_TOKENS",
        parsers.integer(0, MAX_DRAFT_TOKENS),
        "most tokens that are drafted for a row of a step, as many as pay for themselves; 0: nothing is drafted",
        "16",
    )
    prefix_sharing: str = setting(
        "LAMINA_PREFIX_SHARING",
        parsers.one_of("auto", "pipeline", "client", "off"),
        "who may find the keys and values that a prompt left at the stages: all clients of the pipeline, only the client, "
        "nobody (off); auto: client where there are API keys, else pipeline",
        "auto",
    )
    cold_start_timeout_seconds: float = setting(
        "LAMINA_COLD_START_TIMEOUT_SECONDS", parsers.seconds, "how long a request waits for sleeping stages", "300"
    )
    request_timeout_seconds: float = setting(
        "LAMINA_REQUEST_TIMEOUT_SECONDS", parsers.seconds, "how long one answer may take", "600"
    )
    step_timeout_seconds: float = setting(
        "LAMINA_STEP_TIMEOUT_SECONDS", parsers.seconds, "how long one event may be at a stage", "120"
    )
    kubernetes_api: str | None = setting(
        "LAMINA_KUBERNETES_API",
        parsers.kubernetes_api,
        "URL of the API that serves EndpointSlices; cluster: from the pod's ServiceAccount; unset: no watch",
        "",
    )
    stage_services: tuple[str, ...] | None = setting(
        "LAMINA_STAGE_SERVICES",
        parsers.services,
        "names of the stages' Knative Services, whose EndpointSlices are watched; unset: the first label of each URL's host",
        "",
    )
    stage_targets: tuple[float, ...] | None = setting(
        "LAMINA_STAGE_TARGETS",
        parsers.targets,
        "concurrency of a replica of each stage at which another is added, to be shown; 0: scaled otherwise; unset: not known",
        "",
    )
    page: str = setting(
        "LAMINA_PAGE", parsers.one_of("on", "off"), "whether `GET /` is a page that chats and shows the pipeline", "on"
    )
    namespace: str = setting("LAMINA_NAMESPACE", parsers.text, "namespace of the stages", "default")

    @property
    def sharing(self) -> str:
        """`prefix_sharing` decided: a hit is visible in its time, so that those who have keys share with nobody else."""
        if self.prefix_sharing != "auto":
            return self.prefix_sharing
        return "pipeline" if self.api_keys is None and self.api_key_files is None else "client"


Config = StageConfig | GatewayConfig
_ROLES: Final[dict[str, type[StageConfig] | type[GatewayConfig]]] = {"stage": StageConfig, "gateway": GatewayConfig}


def read_config(environ: Mapping[str, str]) -> Config:
    """The configuration of the role that the environment names.

    Raises ConfigError with one sentence for each wrong, missing or unknown key.
    """
    errors = list(unknown_keys(environ, _PREFIX, {key.name for key, _ in _all_keys()}))
    try:
        role = _ROLE.read(environ)
    except ValueError as error:
        raise ConfigError([*errors, str(error)]) from error
    errors += _keys_of_another_role(role, environ)
    try:
        config = read(_ROLES[role], environ)
    except ConfigError as error:
        raise ConfigError([*errors, *error.errors]) from error
    errors += _contradictions(config)
    if errors:
        raise ConfigError(errors)
    return config


def environment() -> Iterator[tuple[str, str, str, str]]:
    """Key, role, default and meaning of everything that a function reads. No default: empty."""
    for key, role in _all_keys():
        yield key.name, role, "required" if key.default == REQUIRED else key.default, key.meaning


def _all_keys() -> list[tuple[Key, str]]:
    """Every key with its role: both, stage or gateway."""
    common = list(keys(CommonConfig))
    own = [(key, role) for role, settings in _ROLES.items() for key in keys(settings) if key not in common]
    return [(_ROLE, "both"), *((key, "both") for key in common), *own]


def _keys_of_another_role(role: str, environ: Mapping[str, str]) -> Iterator[str]:
    for key, owner in _all_keys():
        if owner not in ("both", role) and key.name in environ:
            yield f"{key.name} is a key of the {owner}, and {ROLE_KEY} is {role}"


def _missing_keys(store: StoreConfig) -> Iterator[str]:
    for name, value in (("AWS_ACCESS_KEY_ID", store.access_key_id), ("AWS_SECRET_ACCESS_KEY", store.secret_access_key)):
        if value is None and store.web_identity_token_file is None:
            yield f"{name} is not set (the store wants keys, or AWS_WEB_IDENTITY_TOKEN_FILE a token to exchange for some)"


def _unencrypted(kv_store: KVStoreConfig) -> Iterator[str]:
    if kv_store.place is not None and kv_store.key is None:
        yield "LAMINA_KV_KEY is not set, and what LAMINA_KV_STORE keeps is what clients said: 64 hexadecimal digits"
    if (kv_store.access_key_id is None) != (kv_store.secret_access_key is None):
        yield "LAMINA_KV_STORE_ACCESS_KEY_ID and LAMINA_KV_STORE_SECRET_ACCESS_KEY belong together: set both, or none"


def _contradictions(config: Config) -> Iterator[str]:
    """Values that are right by themselves and wrong together."""
    cut = ",".join(f"{first}:{last}" for first, last in config.cut)
    yield from _missing_keys(config.store)
    if isinstance(config, StageConfig):
        yield from _unencrypted(config.kv_store)
        if config.layers not in config.cut:
            first, last = config.layers
            yield f"LAMINA_LAYERS: '{first}:{last}' is not allowed: one of the groups of LAMINA_CUT, {cut}"
        for key, value in (
            ("LAMINA_SLEEP_PASS_TIMES", config.sleep_pass_times),
            ("LAMINA_SLEEP_BYTES_PER_SECOND", config.sleep_bytes_per_second),
        ):
            if value is not None and config.layer_group != "sleep":
                yield f"{key} emulates a device, and LAMINA_LAYER_GROUP is {config.layer_group}: leave it out, or say sleep"
        if config.device == "cuda" and config.dtype in ("int8", "q4"):
            yield (
                f"LAMINA_DEVICE: 'cuda' is not allowed with LAMINA_DTYPE {config.dtype}, which runs on CPUs: "
                "cpu, auto, or another dtype"
            )
        if config.layer_group == "transformers" and config.dtype in ("int8", "q4"):
            yield f"LAMINA_LAYER_GROUP: 'transformers' is not allowed with LAMINA_DTYPE {config.dtype}: auto, or another dtype"
        return
    if tuple(group for group, _ in config.stages) != config.cut:
        named = ",".join(f"{first}:{last}" for (first, last), _ in config.stages)
        yield f"LAMINA_STAGES: {named} is not allowed: the groups of LAMINA_CUT in their order, {cut}"
    if config.stage_services is not None and len(config.stage_services) != len(config.cut):
        names = ",".join(config.stage_services)
        yield f"LAMINA_STAGE_SERVICES: {names} is not allowed: one name for each group of LAMINA_CUT, {cut}"
    if config.stage_targets is not None and len(config.stage_targets) != len(config.cut):
        numbers = ",".join(f"{each:g}" for each in config.stage_targets)
        yield f"LAMINA_STAGE_TARGETS: {numbers} is not allowed: one number for each group of LAMINA_CUT, {cut}"
