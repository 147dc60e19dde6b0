"""Publishing without torch and transformers: the same publication, and an error that names them if they are needed."""

from pathlib import Path
from subprocess import CompletedProcess

import pytest

from storage.models.model_repository import read_manifest
from storage.models.publisher import publish
from storage.store.object_store import ObjectStore
from tests.support.house.without import HEAVY, run_without
from tests.support.storage import tiny_models
from tests.support.storage.storage import STORE_OF_ARGUMENTS, default_model_gguf, store_arguments

PUBLISH = f"""{STORE_OF_ARGUMENTS}
from storage.models.publisher import publish
source, name, dtype = sys.argv[1:4]
print(publish(source, store, name, dtype).digest)
"""


def publish_lean(source: Path, name: str, dtype: str, store: ObjectStore, folder: Path) -> CompletedProcess[str]:
    """Publishes in a process without HEAVY libraries."""
    return run_without(HEAVY, folder, "-c", PUBLISH, str(source), name, dtype, *store_arguments(store.settings))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "q4"])
def test_a_folder_is_published_equally(dtype: str, store: ObjectStore, tmp_path: Path) -> None:
    tiny_models.whole_model("qwen3").save_pretrained(tmp_path)
    done = publish_lean(tmp_path, "lean", dtype, store, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == publish(tmp_path, store, "full", dtype).digest


def test_the_default_model_is_published(store: ObjectStore, tmp_path: Path) -> None:
    done = publish_lean(default_model_gguf(), "default", "int8", store, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == read_manifest(store, "default", "int8").digest


def test_a_family_without_a_table_names_the_missing_libraries(store: ObjectStore, tmp_path: Path) -> None:
    tiny_models.whole_model("gptj").save_pretrained(tmp_path)
    done = publish_lean(tmp_path, "gptj", "float32", store, tmp_path)
    words = "LibraryMissing: publishing a 'gptj' takes transformers, which is not installed here"
    assert words in done.stderr.splitlines()[-1]
    assert "pip install -r requirements.txt, or the image's target `full`" in done.stderr.splitlines()[-1]
    assert not [*store.list("models/gptj/")]
