"""LangChain's standard tests of chat models against the default model: a tiny one follows no instruction."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.models.publisher import publish
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from tests.clients.conftest import Run
from tests.support.functions.functions import FunctionProcess, gateway_environment, running, stage_environment
from tests.support.storage.published import Published
from tests.support.storage.storage import default_model_gguf

CUT = ((0, 10), (10, 20), (20, 30))
SUITE = Path(__file__).with_name("langchain_standard.py")


@pytest.fixture(scope="module")
def default_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FunctionProcess]:
    """A gateway over three stages in q4, the dtype of the packaged model."""
    with EmbeddedStore(tmp_path_factory.mktemp("langchain")) as store:
        manifest = publish(default_model_gguf(), ObjectStore(store.settings), "smollm2", "q4")
        published = Published(store.settings, manifest, None, None)  # type: ignore[arg-type]  # no oracle is needed
        stages = [stage_environment(published, group, CUT, LAMINA_KV_CACHE_BYTES=str(2**28)) for group in range(len(CUT))]
        with (
            running(stages) as started,
            running([gateway_environment(published, [stage.url for stage in started], CUT)]) as (gateway,),
        ):
            yield gateway


@pytest.mark.timeout(300)
def test_langchains_standard_tests_pass(default_model: FunctionProcess, run_client: Run, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    # One event loop for all: ChatOpenAI keeps connections from one instance to the next.
    loops = ["-o", "asyncio_mode=auto", "-o", "asyncio_default_test_loop_scope=session"]
    options = ["-c", "/dev/null", "--noconftest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *loops]
    run_client("pytest", *options, f"--junitxml={report}", str(SUITE), LAMINA_URL=default_model.url)
    suite = ElementTree.parse(report).getroot()[0]
    left_out = int(suite.attrib["skipped"])  # with those that are expected to fail
    assert int(suite.attrib["tests"]) - left_out >= 35
    assert suite.attrib["failures"] == suite.attrib["errors"] == "0"
