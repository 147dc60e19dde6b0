"""`push-adapter` and `adapters` with a real S3 server."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from knative.__main__ import main
from storage.models.publisher import publish
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore

MODULE = "base_model.model.model.layers.1.self_attn.q_proj"


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="python -m knative")


def test_an_adapter_is_pushed_listed_shared_and_deleted(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my-lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    with EmbeddedStore(tmp_path / "store") as server:
        monkeypatch.setenv("LAMINA_STORE_ENDPOINT", server.settings.endpoint_url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.settings.access_key_id or "")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.settings.secret_access_key or "")
        publish(checkpoint, ObjectStore(server.settings), "tiny", "float32")
        versions = []
        for number in (1, 2):
            a, b = (np.full(shape, number, np.float32) for shape in ((2, 32), (32, 2)))
            save_file({f"{MODULE}.lora_A.weight": a, f"{MODULE}.lora_B.weight": b}, folder / "adapter_model.safetensors")
            pushed = command("push-adapter", str(folder), "--model", "tiny", "--share", "20")
            assert pushed.exit_code == 0, pushed.output
            assert pushed.stdout.startswith("tiny:my-lora: rank 2, ")
            versions.append(pushed.stdout.split()[-1])
        assert versions[0] != versions[1]
        listed = command("adapters").stdout
        assert all(version in listed for version in versions)
        assert "80 %" in listed
        assert "100 %" in command("adapters", "--share", f"tiny:my-lora@{versions[0][:8]}=100").stdout
        assert command("adapters", "--share", "tiny:my-lora=100").exit_code == 2
        assert command("push-adapter", str(folder), "--model", "other").exit_code == 1
        assert versions[0] not in command("adapters", "--delete", "tiny:my-lora").stdout
