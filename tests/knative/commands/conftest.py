"""A tiny model in a folder, and a run of it that ends with its test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.knative.run_command import Run
from tests.support.storage.published import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-model"
    save_checkpoint(folder)
    return folder


@pytest.fixture
def running(checkpoint: Path, tmp_path: Path) -> Iterator[Run]:
    run = Run(checkpoint, tmp_path / "state")
    try:
        yield run
    finally:
        run.end()
