"""The environment of a function: defaults, every kind of mistake, and the output of `python -m functions`."""

import subprocess
import sys
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address

import pytest

from functions.configuration.api_keys import parse_keys
from functions.configuration.config import GatewayConfig, StageConfig, environment, read_config
from functions.configuration.environment_page import help_text, markdown_page
from functions.configuration.settings import ConfigError
from tests.support.environments import GATEWAY, STAGE, gateway_config
from tests.support.paths import ROOT


def errors(environ: Mapping[str, str]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read_config(environ)
    return caught.value.errors


def test_a_stage_reads_its_keys_and_uses_defaults_for_others() -> None:
    config = read_config({**STAGE, "LAMINA_THREADS": "3", "LAMINA_WEIGHTS_CACHE": "", "HOME": "/nowhere"})
    assert isinstance(config, StageConfig)
    assert (config.layers, config.cut, config.threads) == ((2, 4), ((0, 2), (2, 4)), 3)
    assert (config.port, config.layer_group, config.weights_cache) == (8080, "auto", None)
    assert config.store.endpoint_url == "http://127.0.0.1:9000"


_PRIVATE = ("10.1.2.3", "172.31.0.1", "192.168.7.7", "100.64.0.9", "fd12::1")
_OTHERS = ("127.0.0.1", "169.254.169.254", "8.8.8.8", "2001:db8::1", "fe80::1")


def test_the_store_needs_keys_or_a_web_identity_token() -> None:
    without = {name: value for name, value in GATEWAY.items() if not name.startswith("AWS_")}
    with pytest.raises(ConfigError) as failure:
        read_config(without)
    assert [error.partition(" ")[0] for error in failure.value.errors] == ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
    token = {"AWS_WEB_IDENTITY_TOKEN_FILE": "/token", "AWS_ROLE_ARN": "arn:aws:iam::1:role/chat"}
    store = read_config(without | token | {"AWS_ENDPOINT_URL_STS": "http://minio:9000"}).store
    assert (store.web_identity_token_file, store.role_arn, store.sts_endpoint) == (*token.values(), "http://minio:9000")
    assert store.access_key_id is None


TLS = {"LAMINA_TLS_CA": "/certs/ca.crt", "LAMINA_TLS_NAME": "chat.default"}


@pytest.mark.parametrize(
    ("environ", "sharing"),
    [
        ({}, "request"),
        ({"LAMINA_PREFIX_SHARING": "pipeline"}, "pipeline"),
        ({"LAMINA_API_KEYS": "one"}, "client"),
        ({"LAMINA_API_KEY_FILES": "/keys/one"}, "client"),
        ({"LAMINA_API_KEY_FILES": "/keys/one", "LAMINA_PREFIX_SHARING": "pipeline"}, "pipeline"),
    ],
)
def test_strangers_share_no_prefixes_by_default(environ: Mapping[str, str], sharing: str) -> None:
    assert gateway_config(**environ).sharing == sharing


def test_a_gateway_reads_its_keys() -> None:
    config = read_config({**GATEWAY, "LAMINA_API_KEYS": "one, two", "LAMINA_POD_NETWORK": "10.0.0.0/8, fd00::/64"})
    assert isinstance(config, GatewayConfig)
    assert config.stages == (((0, 2), "http://one:81"), ((2, 4), "http://two"))
    assert config.api_keys == parse_keys("one,two")
    assert config.pod_network == (IPv4Network("10.0.0.0/8"), IPv6Network("fd00::/64"))
    networks = gateway_config().pod_network  # of the default
    pods = [each for each in (*_PRIVATE, *_OTHERS) if any(ip_address(each) in network for network in networks)]
    assert pods == list(_PRIVATE)


def test_an_empty_list_of_keys_is_an_error() -> None:
    """As from a Secret whose value is empty. If the key is not set, the gateway is open."""
    assert gateway_config().api_keys is None
    (error,) = errors({**GATEWAY, "LAMINA_API_KEYS": ""})
    assert error.startswith("LAMINA_API_KEYS is set and empty")
    assert len(errors({**GATEWAY, "LAMINA_API_KEYS": " "})) == 1


def test_secrets_are_not_shown() -> None:
    shown = repr(read_config({**GATEWAY, "LAMINA_API_KEYS": "secret-api"})) + str(
        errors({**GATEWAY, "LAMINA_API_KEYS": "secret-api,,"})
    )
    assert "secret" not in shown.replace("secret_access_key", "")


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({**STAGE, "LAMINA_KV_CACHE_BYTE": "1"}, ("LAMINA_KV_CACHE_BYTE ", "nearest", "LAMINA_KV_CACHE_BYTES")),
        ({**STAGE, "LAMINA_QUEUE_LIMIT": "1"}, ("LAMINA_QUEUE_LIMIT", "gateway", "stage")),
        ({**STAGE, "LAMINA_ROLE": "router"}, ("LAMINA_ROLE", "'router'", "stage, gateway")),
        ({**STAGE, "LAMINA_ROLE": ""}, ("LAMINA_ROLE", "not set")),
        ({**STAGE, "PORT": "70000"}, ("PORT", "'70000'", "0 to 65535")),
        ({**STAGE, "PORT": "eight"}, ("PORT", "'eight'", "whole number")),
        ({**STAGE, "LAMINA_PIPELINE": "latest"}, ("LAMINA_PIPELINE", "'latest'", "32 hexadecimal")),
        ({**STAGE, "LAMINA_DTYPE": "int4"}, ("LAMINA_DTYPE", "'int4'", "float32")),
        ({**STAGE, "LAMINA_CUT": "0:2,3:4"}, ("LAMINA_CUT", "3:4 should begin at 2")),
        ({**STAGE, "LAMINA_CUT": "1:4"}, ("LAMINA_CUT", "1:4 should begin at 0")),
        ({**STAGE, "LAMINA_LAYERS": "4:2"}, ("LAMINA_LAYERS", "'4:2'", "10:20")),
        ({**STAGE, "LAMINA_LAYERS": "1:4"}, ("LAMINA_LAYERS", "'1:4'", "0:2,2:4")),
        (
            {**STAGE, "LAMINA_LAYER_GROUP": "transformers", "LAMINA_DTYPE": "int8"},
            ("LAMINA_LAYER_GROUP", "'transformers'", "LAMINA_DTYPE int8", "auto"),
        ),
        ({**GATEWAY, "LAMINA_API_KEYS": "good,sha256:12"}, ("LAMINA_API_KEYS", "64 hexadecimal digits")),
        ({**STAGE, "LAMINA_DEVICE": "cuda", "LAMINA_DTYPE": "int8"}, ("LAMINA_DEVICE", "'cuda'", "LAMINA_DTYPE int8", "auto")),
        ({**STAGE, "LAMINA_DEVICE": "cuda", "LAMINA_DTYPE": "q4"}, ("LAMINA_DEVICE", "'cuda'", "LAMINA_DTYPE q4", "auto")),
        ({**STAGE, "LAMINA_SLEEP_SECONDS": "1e10"}, ("LAMINA_SLEEP_SECONDS", "'1e10'", "at most 10000000")),
        ({**STAGE, "LAMINA_LISTEN": "here"}, ("LAMINA_LISTEN", "'here'")),
        ({**STAGE, "LAMINA_SLEEP_PASS_TIMES": "{}"}, ("LAMINA_SLEEP_PASS_TIMES", "emulates a device", "say sleep")),
        ({**STAGE, "LAMINA_SLEEP_BYTES_PER_SECOND": "9"}, ("LAMINA_SLEEP_BYTES_PER_SECOND", "emulates a device", "say sleep")),
        (
            {**STAGE, "LAMINA_LAYER_GROUP": "sleep", "LAMINA_SLEEP_PASS_TIMES": '{"tokens": 1}'},
            ("LAMINA_SLEEP_PASS_TIMES", "token_seconds"),
        ),
        ({**STAGE, "LAMINA_SLEEP_SECONDS": "nan"}, ("LAMINA_SLEEP_SECONDS", "'nan'", "more than 0")),
        ({**STAGE, "LAMINA_STORE_ENDPOINT": "s3.example"}, ("LAMINA_STORE_ENDPOINT", "'s3.example'", "http://")),
        ({**STAGE, "LAMINA_STORE_ENDPOINT": "http://host:port"}, ("LAMINA_STORE_ENDPOINT", "'http://host:port'")),
        ({**STAGE, "LAMINA_STORE_BUCKET": "a/b"}, ("bucket", "'a/b'")),
        ({**GATEWAY, "LAMINA_STAGES": "0:2=http://one"}, ("LAMINA_STAGES", "0:2,2:4")),
        ({**GATEWAY, "LAMINA_STAGES": "0:2,2:4"}, ("LAMINA_STAGES", "has no '='")),
        ({**STAGE, "LAMINA_KV_STORE": "lamina/kv"}, ("LAMINA_KV_KEY is not set", "64 hexadecimal")),
        ({**STAGE, "LAMINA_KV_STORE": "lamina", "LAMINA_KV_KEY": "a" * 64}, ("LAMINA_KV_STORE", "'lamina'", "BUCKET/PREFIX")),
        ({**STAGE, "LAMINA_KV_KEY": "secret"}, ("LAMINA_KV_KEY", "not shown", "openssl rand -hex 32")),
        ({**STAGE, "LAMINA_KV_STORE_ACCESS_KEY_ID": "a"}, ("LAMINA_KV_STORE_SECRET_ACCESS_KEY", "belong together")),
        ({**GATEWAY, "LAMINA_POD_NETWORK": "10.0.0.1/8"}, ("LAMINA_POD_NETWORK", "10.244.0.0/16")),
        ({**GATEWAY, "LAMINA_CLIENT_TOKENS_PER_MONTH": "9"}, ("LAMINA_LIMITS_STORE", "LAMINA_CLIENT_TOKENS_PER_MONTH")),
        ({**GATEWAY, "LAMINA_PREFIX_SHARING": "client"}, ("LAMINA_PREFIX_SHARING", "client", "API keys")),
        ({**GATEWAY, "LAMINA_STAGE_TARGETS": "1.4"}, ("LAMINA_STAGE_TARGETS", "1.4", "0:2,2:4")),
        ({**GATEWAY, "LAMINA_STAGE_TARGETS": "1.4,nan"}, ("LAMINA_STAGE_TARGETS", "'1.4,nan'", "separated by commas")),
        ({**GATEWAY, "LAMINA_PAGE": "yes"}, ("LAMINA_PAGE", "'yes'", "on, off")),
        ({**GATEWAY, "LAMINA_POD_PORT": "-1"}, ("LAMINA_POD_PORT", "'-1'")),
        ({**STAGE, "LAMINA_TLS_CA": "ca.crt"}, ("LAMINA_TLS_CA and LAMINA_TLS_NAME belong together",)),
        ({**STAGE, "LAMINA_TLS_CA": "", "LAMINA_TLS_NAME": "x"}, ("LAMINA_TLS_CA is set and empty",)),
        ({**STAGE, **TLS, "LAMINA_TLS_KEY": "k"}, ("LAMINA_TLS_CERTIFICATE and LAMINA_TLS_KEY", "LAMINA_TLS_CA")),
        ({**STAGE, **TLS, "LAMINA_TLS_PORT": "8443"}, ("LAMINA_TLS_PORT", "LAMINA_TLS_CERTIFICATE")),
        ({**GATEWAY, **TLS}, ("LAMINA_KUBERNETES_API is not set", "LAMINA_TLS_CA")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_an_error_names_the_key_and_what_is_allowed(environ: Mapping[str, str], words: tuple[str, ...]) -> None:
    (error,) = errors(environ)
    assert all(word in error for word in words), error


def test_all_mistakes_are_reported_at_once() -> None:
    seen = errors({**STAGE, "LAMINA_DTYPE": "x", "LAMINA_MODEL": "", "LAMINA_THREADS": "-1", "LAMINA_NOTHING": "1"})
    assert [error.split(":")[0].split()[0] for error in seen] == [
        "LAMINA_NOTHING",
        "LAMINA_MODEL",
        "LAMINA_DTYPE",
        "LAMINA_THREADS",
    ]


def test_the_reference_is_up_to_date() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    assert markdown_page() in page, "run: make generate"


def test_every_key_is_in_the_help() -> None:
    assert all(f"  {key}" in help_text() for key, *_ in environment())


def run(arguments: list[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "functions", *arguments]
    return subprocess.run(command, cwd=ROOT, env=dict(environ), capture_output=True, text=True, timeout=30, check=False)


def test_the_program_prints_each_mistake_and_exits_with_status_2() -> None:
    ended = run([], {**STAGE, "LAMINA_DTYPE": "x", "LAMINA_CACHE": "1"})
    assert ended.returncode == 2
    assert [line.split()[:2] for line in ended.stderr.splitlines()] == [["error:", "LAMINA_CACHE"], ["error:", "LAMINA_DTYPE:"]]


def test_the_program_does_not_start_without_its_certificates() -> None:
    for role in (STAGE, {**GATEWAY, "LAMINA_KUBERNETES_API": "http://127.0.0.1:9"}):
        ended = run([], role | TLS)
        assert ended.returncode == 2
        assert "TLS between pods: /certs/ca.crt: No such file or directory; is the Secret with it mounted?" in ended.stderr


def test_help_needs_no_environment() -> None:
    assert run(["--help"], {}).stdout == help_text()
    assert run(["--environment"], {}).stdout == markdown_page()
    refused = run(["--port", "80"], {})
    assert refused.returncode == 2
    assert "--help" in refused.stderr
