"""`kv` shows and prunes the storage of idle conversations, with a real S3 server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from knative.__main__ import main
from storage.kv.kv_store import KVObjects
from storage.kv.parts import KVPart
from storage.kv.sealed import Sealer
from storage.store.embedded import EmbeddedStore
from storage.store.payload_store import PayloadStore


@pytest.fixture
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PayloadStore]:
    with EmbeddedStore(tmp_path) as server, PayloadStore(server.settings) as store:
        monkeypatch.setenv("LAMINA_STORE_ENDPOINT", server.settings.endpoint_url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.settings.access_key_id or "")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.settings.secret_access_key or "")
        yield store


def kv(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["kv", *arguments], prog_name="python -m knative", catch_exceptions=False)


def keep(objects: PayloadStore, pipeline: str, layers: tuple[int, int], parts: int) -> None:
    store = KVObjects(objects, Sealer(b"k" * 32), "kv", pipeline, layers)
    for number in range(parts):
        store.put(store.key("native", bytes(16), KVPart(number, 1)), bytes(2**20))


@pytest.mark.slow
def test_kv_is_shown_by_pipeline_and_stage_and_pruned(objects: PayloadStore) -> None:
    assert "nothing is stored" in kv().stdout
    objects.put("models/tiny/manifest.json", b"{}")
    keep(objects, "1f0a", (0, 10), 3)
    keep(objects, "1f0a", (10, 20), 2)
    keep(objects, "2b3c", (0, 10), 1)
    shown = kv().stdout
    assert [line.split()[:4] for line in shown.splitlines()[1:]] == [
        ["1f0a", "0-10", "3", "3.0"],
        ["1f0a", "10-20", "2", "2.0"],
        ["2b3c", "0-10", "1", "1.0"],
    ]
    assert "0 objects deleted" in kv("--prune", "--max-age-hours", "1").stdout
    assert "1 objects deleted" in kv("--prune", "--pipeline", "2b").stdout
    assert "2 objects deleted" in kv("--prune", "--max-mib", "4").stdout
    assert len(list(objects.list("kv/"))) == 3
    assert "3 objects deleted" in kv("--prune").stdout
    assert objects.get("models/tiny/manifest.json") == b"{}"
    assert kv("--max-mib", "1").exit_code == 2
