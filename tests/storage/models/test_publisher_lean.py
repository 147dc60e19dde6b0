"""Publishing without torch and transformers: the same publication, and an error that names them if they are needed."""

from pathlib import Path

import pytest

from storage.models.model_repository import read_manifest
from storage.models.publisher import publish
from storage.store.object_store import ObjectStore
from tests.support.house.without import HEAVY, run_without
from tests.support.storage import tiny_models
from tests.support.storage.storage import default_model_gguf

PUBLISH = """
import sys
from storage.models.publisher import publish
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings
source, name, dtype, endpoint, key, secret = sys.argv[1:]
settings = StoreSettings(endpoint_url=endpoint, bucket="lamina", access_key_id=key, secret_access_key=secret)
print(publish(source, ObjectStore(settings), name, dtype).digest)
"""


@pytest.fixture(scope="module")
def keys(store: ObjectStore) -> list[str]:
    settings = store.settings
    return [settings.endpoint_url, settings.access_key_id, settings.secret_access_key]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "q4"])
def test_a_folder_is_published_equally(dtype: str, store: ObjectStore, keys: list[str], tmp_path: Path) -> None:
    tiny_models.whole_model("qwen3").save_pretrained(tmp_path)
    done = run_without(HEAVY, tmp_path, "-c", PUBLISH, str(tmp_path), "lean", dtype, *keys)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == publish(tmp_path, store, "full", dtype).digest


def test_the_default_model_is_published(store: ObjectStore, keys: list[str], tmp_path: Path) -> None:
    done = run_without(HEAVY, tmp_path, "-c", PUBLISH, str(default_model_gguf()), "default", "int8", *keys)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == read_manifest(store, "default", "int8").digest


def test_a_family_without_a_table_names_the_missing_libraries(store: ObjectStore, keys: list[str], tmp_path: Path) -> None:
    tiny_models.whole_model("gpt2").save_pretrained(tmp_path)
    done = run_without(HEAVY, tmp_path, "-c", PUBLISH, str(tmp_path), "gpt2", "float32", *keys)
    words = "LibraryMissing: publishing a 'gpt2' takes transformers, which is not installed here"
    assert words in done.stderr.splitlines()[-1]
    assert "pip install -r requirements.txt, or the image's target `full`" in done.stderr.splitlines()[-1]
    assert not [*store.list("models/gpt2/")]
