"""A model that an older version published in a dtype that no stage runs is not deployed."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from knative.__main__ import main
from storage.models import publisher
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from tests.support.storage.published import save_checkpoint

SPEC = """\
name: chat
model: {{name: odd, dtype: int8}}
stages: 2
image: registry.example.com/lamina:1
store: {{endpoint: "{endpoint}", bucket: {bucket}}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["render", "deploy"])
def test_an_unservable_model_is_refused(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "odd"
    save_checkpoint(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"hidden_act": "quick_gelu"}))
    spec = tmp_path / "pipeline.yaml"
    with EmbeddedStore(tmp_path / "store") as embedded:
        with monkeypatch.context() as older:
            older.setattr(publisher, "check_runnable", lambda *_: None)
            publisher.publish(checkpoint, ObjectStore(embedded.settings), "odd", "int8")
        spec.write_text(SPEC.format(endpoint=embedded.settings.endpoint_url, bucket=embedded.settings.bucket))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", embedded.settings.access_key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", embedded.settings.secret_access_key)
        options = ["--store-endpoint", embedded.settings.endpoint_url, "--store-bucket", embedded.settings.bucket]
        result = CliRunner().invoke(main, [command, str(spec), *options])
    assert result.exit_code == 1, result.output
    assert "no stage would run it in int8: the lean layers do not run activation 'quick_gelu'" in result.output
