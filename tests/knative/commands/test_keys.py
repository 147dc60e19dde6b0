"""API keys are stored as hashes, listed by their id in logs, and valid at a gateway until they are revoked."""

import base64
from pathlib import Path

import yaml
from click.testing import CliRunner, Result

from functions.configuration.api_keys import sha256_of
from knative.__main__ import main
from tests.support.functions.scripted_gateway import Pipeline, ask, client_of


def keys(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["keys", *map(str, arguments)], prog_name="python -m knative")


def status(secret: Path, key: str, pipeline: Pipeline) -> int:
    """The status with which a gateway that reads the Secret answers the key."""
    document = yaml.safe_load(secret.read_text())
    assert (document["kind"], document["metadata"]["name"]) == ("Secret", secret.stem)
    client = client_of(pipeline, LAMINA_API_KEYS=document["stringData"]["api-keys"])
    return ask(client, {"prompt": "Hi"}, Authorization=f"Bearer {key}").status_code


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
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
    last = keys(secret, "--revoke", pipeline.prompts[1].client_id)
    assert last.exit_code == 0
    assert "no client may ask" in last.stderr


def test_a_key_has_its_own_limits(tmp_path: Path) -> None:
    """In a list, as a gateway reads it."""
    file = tmp_path / "api-keys"
    made = keys(file, "--make", "alice", "--limit", "requests_per_minute=2", "--limit", "priority=-3").stdout.strip()
    assert file.read_text().split()[1:] == ["name=alice", "requests_per_minute=2", "priority=-3"]
    assert "requests_per_minute 2, priority -3" in " ".join(keys(file).stdout.split())
    pipeline = Pipeline()
    client = client_of(pipeline, LAMINA_API_KEY_FILES=str(file))
    answered = [ask(client, {"prompt": "Hi"}, Authorization=f"Bearer {made}").status_code for _ in range(3)]
    assert answered == [200, 200, 429]
    assert pipeline.prompts[0].priority == -3


def test_other_fields_of_a_secret_are_kept(tmp_path: Path) -> None:
    secret = tmp_path / "chat-api-keys.yaml"
    data = {"api-keys": base64.b64encode(b"by-hand, other").decode(), "more": "eA=="}
    metadata = {"name": "chat-api-keys", "namespace": "chat", "annotations": {"a": "b"}}
    secret.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data}))
    assert keys(secret).stdout.count("clear text") == 2
    assert keys(secret, "--make", "alice").exit_code == 0
    found = yaml.safe_load(secret.read_text())
    assert found["data"] == {"more": "eA=="}
    assert found["metadata"]["annotations"]["a"] == "b"
    lines = found["stringData"]["api-keys"].splitlines()
    assert [line.split()[0] for line in lines[:2]] == [f"sha256:{sha256_of(key)}" for key in ("by-hand", "other")]
    assert "name=alice" in lines[2]


def test_failures_are_one_line(tmp_path: Path) -> None:
    secret, other = tmp_path / "keys.yaml", tmp_path / "other.yaml"
    broken = tmp_path / "broken"
    broken.write_text("one-key another-key\n")
    other.write_text("kind: ConfigMap\nmetadata: {name: x}\n")
    assert keys(secret, "--make", "alice").exit_code == 0
    for arguments, words in (
        ((secret, "--make", "alice"), "alice has a key"),
        ((secret, "--revoke", "bob"), "no key has the id or the name 'bob'"),
        ((broken,), "word 2 of key 1 is none of NAME=VALUE"),
        ((other,), "holds no Secret"),
    ):
        result = keys(*arguments)
        assert (result.exit_code, words in result.output) == (1, True), result.output
        assert "another-key" not in result.output
    assert keys(secret, "--make", "a", "--revoke", "b").exit_code == 2
    assert keys(secret, "--revoke", "alice", "--limit", "concurrent=1").exit_code == 2
    wrong = keys(secret, "--make", "a", "--limit", "requests=1")
    assert (wrong.exit_code, "NAME one of requests_per_minute" in " ".join(wrong.output.split())) == (2, True)
