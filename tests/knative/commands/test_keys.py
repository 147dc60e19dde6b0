"""API keys: made once, kept as hashes, listed by what logs call them, and good at a gateway until they are revoked."""

import base64
from pathlib import Path

import yaml
from click.testing import CliRunner, Result

from knative.__main__ import main
from tests.support.functions.doors import Pipeline, ask, client_of


def keys(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["keys", *map(str, arguments)], prog_name="python -m knative")


def status(secret: Path, key: str, pipeline: Pipeline) -> int:
    """What a gateway that reads the Secret says to the key."""
    document = yaml.safe_load(secret.read_text())
    assert (document["kind"], document["metadata"]["name"]) == ("Secret", secret.stem)
    client = client_of(pipeline, LAMINA_API_KEYS=document["stringData"]["api-keys"])
    return ask(client, {"prompt": "Hi"}, Authorization=f"Bearer {key}").status_code


def test_made_listed_and_revoked(tmp_path: Path) -> None:
    secret, pipeline = tmp_path / "chat-api-keys.yaml", Pipeline()
    made = {name: keys(secret, "--make", name).stdout.strip() for name in ("alice", "bob")}
    assert len({*made.values()}) == 2
    assert all(len(key) > 40 for key in made.values())
    assert not any(key in secret.read_text() for key in made.values())
    assert [status(secret, key, pipeline) for key in (*made.values(), "another")] == [200, 200, 401]
    listed = keys(secret).stdout
    for name, prompt in zip(made, pipeline.prompts, strict=True):
        assert name in listed
        assert prompt.client_id in listed
    assert keys(secret, "--revoke", "alice").exit_code == 0
    assert [status(secret, key, pipeline) for key in made.values()] == [401, 200]
    assert "alice" not in secret.read_text()
    assert keys(secret, "--revoke", pipeline.prompts[1].client_id).exit_code == 1, "the last one"
    assert status(secret, made["bob"], pipeline) == 200


def test_a_secret_as_kubectl_gives_it_keeps_what_else_it_has(tmp_path: Path) -> None:
    secret = tmp_path / "chat-api-keys.yaml"
    data = {"api-keys": base64.b64encode(b"by-hand, other").decode(), "more": "eA=="}
    metadata = {"name": "chat-api-keys", "namespace": "chat", "annotations": {"a": "b"}}
    secret.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data}))
    assert keys(secret).stdout.count("clear text") == 2
    assert keys(secret, "--make", "alice").exit_code == 0
    found = yaml.safe_load(secret.read_text())
    assert found["data"] == {"more": "eA=="}
    assert found["metadata"]["annotations"]["a"] == "b"
    assert found["stringData"]["api-keys"].startswith("by-hand,other,sha256:")


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    secret, other = tmp_path / "keys.yaml", tmp_path / "other.yaml"
    other.write_text("kind: ConfigMap\nmetadata: {name: x}\n")
    assert keys(secret, "--make", "alice").exit_code == 0
    for arguments, words in (
        ((secret, "--make", "alice"), "alice has a key"),
        ((secret, "--revoke", "bob"), "no key has the id or the name 'bob'"),
        ((secret, "--revoke", "alice"), "its last key"),
        ((other,), "holds no Secret"),
    ):
        result = keys(*arguments)
        assert (result.exit_code, words in result.output) == (1, True), result.output
    assert keys(secret, "--make", "a", "--revoke", "b").exit_code == 2
