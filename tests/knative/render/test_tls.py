"""TLS between pods as it is rendered: which files, names and ports gateway and stages get."""

from typing import Any, cast

import pytest

from functions.configuration.config import StageConfig, TLSConfig, read_config
from knative.render.services import gateway_service, stage_service
from tests.support.knative.manifests import environment_of, resolved_pipeline

FOLDER = "/var/run/secrets/lamina"


def secret(name: str, *keys: str) -> dict[str, Any]:
    return {"name": "tls", "secret": {"secretName": name, "items": [{"key": key, "path": key} for key in keys]}}


def config_map(name: str) -> dict[str, Any]:
    return {"name": "tls-ca", "configMap": {"name": name, "items": [{"key": "ca.crt", "path": "ca.crt"}]}}


def files(ca: str, name: str, *, own: bool = False) -> TLSConfig:
    certificate, key = (f"{FOLDER}/tls/tls.crt", f"{FOLDER}/tls/tls.key") if own else (None, None)
    return TLSConfig(ca=f"{FOLDER}/{ca}/ca.crt", name=name, certificate=certificate, key=key)


OWN = ("tls.crt", "tls.key")


@pytest.mark.parametrize(
    ("tls", "expected", "port", "volumes"),
    [
        ({}, files("tls", "kn-user-default"), 8112, [secret("serving-certs", "ca.crt")]),
        ({"ca_config_map": "trust", "name": "x.example"}, files("ca", "x.example"), 8112, [config_map("trust")]),
        ({"secret": "chat-tls"}, files("tls", "chat.default", own=True), 8443, [secret("chat-tls", "ca.crt", *OWN)]),
        (
            {"secret": "chat-tls", "ca_config_map": "trust"},
            files("ca", "chat.default", own=True),
            8443,
            [secret("chat-tls", *OWN), config_map("trust")],
        ),
    ],
)
def test_functions_read_what_is_mounted(
    tls: dict[str, str], expected: TLSConfig, port: int, volumes: list[dict[str, Any]]
) -> None:
    pipeline = resolved_pipeline(network={"tls": tls})
    for service in (stage_service(pipeline, 1), gateway_service(pipeline)):
        config = read_config(environment_of(service))
        assert config.tls == expected
        assert config.pod_port == port
        if isinstance(config, StageConfig):
            assert config.tls_port == (8443 if "secret" in tls else None)
        pod = cast("dict[str, Any]", service["spec"]["template"]["spec"])
        mounted = [each for each in pod["volumes"] if each["name"].startswith("tls")]
        assert mounted == volumes
        folders = {each["name"]: each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
        assert {folders[each["name"]] for each in volumes} <= {f"{FOLDER}/tls", f"{FOLDER}/ca"}


def test_without_tls_nothing_of_it_is_rendered() -> None:
    environ = environment_of(stage_service(resolved_pipeline(), 0))
    assert environ["LAMINA_POD_PORT"] == "8012"
    assert not [key for key in environ if key.startswith("LAMINA_TLS")]
