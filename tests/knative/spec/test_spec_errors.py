"""Errors of a spec name the path of the field and its value."""

from pathlib import Path
from typing import Any

import pytest

from knative.spec.errors import SpecError
from knative.spec.spec_file import load_spec, spec_from_dict
from tests.support.knative.manifests import document

IN_INT8 = {"name": "m", "dtype": "int8"}
FIELDS = [
    ({"name": "Chat"}, r"\$\.name: 'Chat' is not a DNS label"),
    ({"name": "c" * 37}, r"\$\.name: .* at most 36 characters"),
    ({"stages": 3}, r"\$\.stages, \$\.cut: exactly one of them"),
    ({"cut": "0:10,11:20"}, r"\$\.cut: '0:10,11:20': group 11:20 must begin with layer 10"),
    ({"cut": "0:0"}, r"group 0:0 must begin with layer 0 and hold at least one layer"),
    ({"cut": "ten"}, r"\$\.cut: 'ten' is not a cut such as"),
    ({"model": IN_INT8, "stage": {"device": "cuda"}}, r"\$\.stage\.device: 'cuda' does not run dtype int8"),
    (
        {"model": IN_INT8, "stage": {"layer_group": "transformers"}},
        r"\$\.stage\.layer_group: 'transformers' does not run dtype int8",
    ),
    ({"model": {"name": "m", "dtype": "q4"}, "stage": {"device": "cuda"}}, r"'cuda' does not run dtype q4"),
    ({"model": {"name": "m", "dtype": "fp8"}}, r"\$\.model\.dtype: 'fp8' is not one of float32"),
    ({"stage": {"kv_cache": "1 GB"}}, r"\$\.stage\.kv_cache: '1 GB' is no Kubernetes quantity"),
    ({"stage": {"autoscaling": {"target": 9}}}, r"\$\.stage\.autoscaling\.target: 9.* is above container_concurrency 8"),
    ({"stage": {"autoscaling": {"target": "2"}}}, r"\$\.stage\.autoscaling\.target: expected .*seen '2'"),
    ({"stage": {"autoscaling": {"min_scale": 11}}}, r"min_scale: 11 is above max_scale 10"),
    ({"stage": {"autoscaling": {"class": "hpa"}}}, r"min_scale: 0, but the class hpa cannot scale to zero"),
    ({"stage": {"autoscaling": {"target_burst_capacity": -1}}}, r"target_burst_capacity: expected .*at least 0.*seen -1"),
    ({"stage": {"autoscaling": {"targt": 2}}}, r"\$\.stage\.autoscaling\.targt: unknown field, seen 2"),
    ({"stage": {"timeout_seconds": 601}}, r"\$\.stage\.timeout_seconds: .*at most 600, seen 601"),
    ({"store": {"endpoint": "store:9000"}}, r"\$\.store\.endpoint: .*seen 'store:9000'"),
    ({"gateway": {"client_tokens_per_day": 9}}, r"\$\.gateway\.client_tokens_per_day: a budget is counted in a store"),
    ({"gateway": {"client_tokens_per_month": 9}}, r"\$\.gateway\.client_tokens_per_month: a budget .* set limits_secret"),
    (
        {"gateway": {"prefix_sharing": "client"}},
        r"\$\.gateway\.prefix_sharing: 'client' is not allowed without api_keys_secret",
    ),
    ({"gateway": {"pod_network": "10.1.0.1/8"}}, r"\$\.gateway\.pod_network: '10\.1\.0\.1/8' is not a list of networks"),
    ({"gateway": {"api_keys_secret": 3}}, r"\$\.gateway\.api_keys_secret: expected a text or an array.*seen 3"),
    ({"gateway": {"cors_origins": ["*", 1]}}, r"\$\.gateway\.cors_origins\[1\]: expected a text, seen 1"),
    ({"network": {"ingress_namespace": []}}, r"\$\.network\.ingress_namespace: expected an array.*at least 1, seen \[\]"),
    ({"network": {"tls": {"secret": ""}}}, r"\$\.network\.tls\.secret: expected a text that matches .*, seen ''"),
    ({"network": {"tls": {"name": "a b"}}}, r"\$\.network\.tls\.name: expected a text that matches .*, seen 'a b'"),
    ({"network": {"tls": {"ca_config_map": "Trust"}}}, r"\$\.network\.tls\.ca_config_map: expected .*, seen 'Trust'"),
    ({"kv_store": {"secret": "chat-kv", "max_bytes": "many"}}, r"\$\.kv_store\.max_bytes"),
    ({"wire_dtype": "q4"}, r"\$\.wire_dtype"),
    ({"kv_dtype": "q4"}, r"\$\.kv_dtype"),
    ({"kv_dtype": "int8", "stage": {"device": "cuda"}}, r"\$\.stage\.device: 'cuda' does not run with \$\.kv_dtype int8"),
    (
        {"kv_dtype": "int8", "stage_overrides": [{"stage": 0, "layer_group": "transformers"}]},
        r"\$\.stage_overrides\[0\]\.layer_group: 'transformers' does not run with \$\.kv_dtype int8, which takes layers in C",
    ),
    ({"monitoring": {"interval_seconds": 0}}, r"\$\.monitoring\.interval_seconds.*seen 0"),
]
GATEWAY_POD: list[tuple[dict[str, Any], str]] = [
    ({"env": {"LAMINA_THREADS": "1"}}, r"\$\.gateway\.pod\.env: LAMINA_THREADS is set by a field of the spec"),
    ({"env": {"A-B": "1"}}, r"'A-B' is not a valid name of a variable"),
    ({"labels": {"app.kubernetes.io/instance": "x"}}, r"pod\.labels: app\.kubernetes\.io/instance is reserved for Lamina"),
    ({"annotations": {"autoscaling.knative.dev/target": "1"}}, r"pod\.annotations: autoscaling\.knative\.dev/target is"),
    ({"node_selectors": {}}, r"pod\.node_selectors: unknown field"),
]
EVENTING: list[tuple[dict[str, Any], str]] = [
    ({}, r"\$\.eventing: .*dead_letter_sink"),
    ({"dead_letter_sink": "dead letters"}, r"dead_letter_sink: 'dead letters' is not a DNS label"),
    ({"dead_letter_sink": "ftp://x"}, r"dead_letter_sink: 'ftp://x' is neither an http\(s\) URL"),
    ({"dead_letter_sink": "x", "reply_sink": "http://"}, r"reply_sink: 'http://' is neither an http"),
    ({"dead_letter_sink": "x", "retry": -1}, r"\$\.eventing\.retry: .*seen -1"),
    ({"dead_letter_sink": "x", "backoff_policy": "random"}, r"backoff_policy: .*seen 'random'"),
    ({"dead_letter_sink": "x", "timeout_seconds": 601}, r"timeout_seconds: .*seen 601"),
    ({"dead_letter_sink": "x", "broker": "b"}, r"\$\.eventing\.broker: unknown field"),
]
OVERRIDE: list[tuple[dict[str, Any], str]] = [
    ({"device": "cpu"}, r"\$\.stage_overrides\[0\]: needs exactly one of stage .* and layers"),
    ({"stage": 0, "layers": "0:10", "device": "cpu"}, r"needs exactly one of stage .* and layers"),
    ({"stage": 1}, r"\$\.stage_overrides\[0\]: changes nothing"),
    ({"stage": 0, "memory": "2Gi"}, r"\$\.stage_overrides\[0\]\.memory: unknown field"),
    ({"stage": 0, "resources": {"gpu": "one"}}, r"\$\.stage_overrides\[0\]\.resources\.gpu: expected a whole number"),
    ({"stage": 0, "resources": {"memory": "1 GB"}}, r"\$\.stage_overrides\[0\]\.resources\.memory: '1 GB' is no"),
    ({"stage": 0, "autoscaling": {"min_scale": 11}}, r"\$\.stage_overrides\[0\]\.autoscaling\.min_scale: 11 is above"),
    ({"stage": 0, "pod": {"env": {"LAMINA_DTYPE": "x"}}}, r"\$\.stage_overrides\[0\]\.pod\.env: LAMINA_DTYPE is set by"),
    (
        {"stage": 0, "dtype": "float32"},
        r"\$\.stage_overrides\[0\]\.dtype: float32 cannot be combined with \$\.model\.dtype bfloat16",
    ),
    ({"stage": 0, "dtype": "int4"}, r"\$\.stage_overrides\[0\]\.dtype: 'int4' is not one of"),
    ({"stage": 0, "dtype": "int8", "device": "cuda"}, r"\$\.stage_overrides\[0\]\.device: 'cuda' does not run dtype int8"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *FIELDS,
        *(({"gateway": {"pod": pod}}, message) for pod, message in GATEWAY_POD),
        *(({"eventing": section}, message) for section, message in EVENTING),
        *(({"stage_overrides": [override]}, message) for override, message in OVERRIDE),
    ],
)
def test_an_error_names_path_and_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_from_dict(document(**change))


def test_a_pod_network_may_be_a_list() -> None:
    spec_from_dict(document(gateway={"pod_network": "10.244.0.0/16, fd00::/64"}))


def test_errors_begin_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text("name: [")
    with pytest.raises(SpecError, match=r"pipeline\.yaml: cannot be read as YAML"):
        load_spec(path)
    path.write_text("name: chat")
    with pytest.raises(SpecError, match=r"pipeline.yaml: \$: it lacks `model`"):
        load_spec(path)
