"""The API keys of a fleet's members, as their files change and members come and go."""

from pathlib import Path

import pytest

from functions.configuration.config import FleetConfig, read_config
from functions.gateway.answers import authentication
from functions.gateway.fleet import members as module
from functions.gateway.fleet.members import ConfigMap, Members
from functions.gateway.stages.kubernetes_api import Metadata
from tests.support.environments import COMMON, GATEWAY


def members_with_keys(folder: Path) -> Members:
    """A fleet without members. Each one's keys are in the file of its name, which is read again at once."""
    of_process = ("LAMINA_PIPELINE_TOKEN", "LAMINA_STORE", "AWS_")
    environ = {name: value for name, value in COMMON.items() if name.startswith(of_process)} | {
        "LAMINA_ROLE": "fleet",
        "LAMINA_FLEET": "models",
        "LAMINA_FLEET_KEYS": str(folder),
        "LAMINA_KUBERNETES_API": "http://127.0.0.1:9",
    }
    config = read_config(environ)
    assert isinstance(config, FleetConfig)
    return Members(config, environ)


def has(members: Members, *names: str) -> None:
    data = {name: value for name, value in GATEWAY.items() if not name.startswith(("LAMINA_STORE", "AWS_", "LAMINA_ROLE"))}
    del data["LAMINA_PIPELINE_TOKEN"]
    found = {
        name: ConfigMap(Metadata(name, labels={"app.kubernetes.io/instance": name}), data | {"LAMINA_MODEL": name})
        for name in names
    }
    members.changed(found, None)


def test_keys_and_members_that_are_gone_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authentication, "_CHECK_SECONDS", 0.0)
    monkeypatch.setattr(module, "_MOST_OPENED", 3)
    members = members_with_keys(tmp_path)
    has(members, "code", "draw")
    for name in ("code", "draw"):
        (tmp_path / name).write_text(f"key-of-{name}\n")
        assert members.key(f"key-of-{name}") is not None
        assert members.opened_by(f"key-of-{name}") == [name]
    for number in range(10):  # Kubernetes replaces the file
        (tmp_path / "new").write_text(f"key-{number}\n")
        (tmp_path / "new").rename(tmp_path / "code")
        assert members.key(f"key-{number}") is not None
        assert members.key(f"key-{number - 1}" if number else "key-of-code") is None
    assert members.key("key-of-draw") is not None
    assert len(members._opened) <= 3
    has(members, "draw")
    assert members.key("key-9") is None
    assert list(members._rings) == ["draw"]
    (tmp_path / "new").write_text("again\n")
    (tmp_path / "new").rename(tmp_path / "code")
    has(members, "code", "draw")
    assert members.key("again") is not None
