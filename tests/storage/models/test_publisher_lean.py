"""Publishing without torch and transformers: the same publication, and an error that names them if they are needed."""

from pathlib import Path
from subprocess import CompletedProcess

import pytest

from storage.models.publisher import publish
from storage.store.object_store import ObjectStore
from tests.storage.checkpoints.test_gguf_families import write_gguf
from tests.support.house.without import HEAVY, run_without
from tests.support.storage import tiny_models
from tests.support.storage.storage import STORE_OF_ARGUMENTS, default_model_gguf, store_arguments

PUBLISH = f"""{STORE_OF_ARGUMENTS}
from storage.models.publisher import publish
source, name, *dtypes = sys.argv[1:-3]
print(*(publish(source, store, name, dtype).digest for dtype in dtypes))
"""


def publish_lean(source: Path, name: str, store: ObjectStore, folder: Path, *dtypes: str) -> CompletedProcess[str]:
    """Publishes in a process without HEAVY libraries."""
    return run_without(HEAVY, folder, "-c", PUBLISH, str(source), name, *dtypes, *store_arguments(store.settings))


def test_a_folder_is_published_equally(store: ObjectStore, tmp_path: Path) -> None:
    tiny_models.whole_model("qwen3").save_pretrained(tmp_path)
    dtypes = ("float32", "bfloat16", "float16", "int8", "q4")
    done = publish_lean(tmp_path, "lean", store, tmp_path, *dtypes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [publish(tmp_path, store, "full", dtype).digest for dtype in dtypes]


@pytest.mark.parametrize("is_default", [False, pytest.param(True, marks=pytest.mark.wide)])
def test_a_gguf_is_published_equally(is_default: bool, store: ObjectStore, tmp_path: Path) -> None:
    path = default_model_gguf() if is_default else write_gguf(tmp_path / "tiny.gguf", "llama")
    done = publish_lean(path, "lean-gguf", store, tmp_path, "int8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [publish(path, store, "full-gguf", "int8").digest]


def test_a_family_without_a_table_names_the_missing_libraries(store: ObjectStore, tmp_path: Path) -> None:
    tiny_models.whole_model("gptj").save_pretrained(tmp_path)
    done = publish_lean(tmp_path, "gptj", store, tmp_path, "float32")
    words = "LibraryMissing: publishing a 'gptj' takes transformers, which is not installed here"
    assert words in done.stderr.splitlines()[-1]
    assert "pip install -r requirements.txt, or the image's target `full`" in done.stderr.splitlines()[-1]
    assert not [*store.list("models/gptj/")]
