"""The compiled library: which compiler makes it, which file is used, and what happens without either."""

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import torch

from functions.stage.models.build import build_layer_group, native_obstacle
from functions.stage.native import compiler, library
from functions.stage.native.compiler import CompilationFailed, Compiler, NoCompiler
from storage.checkpoints.decoder_config import decoder_of
from tests.support.functions.borders import raw
from tests.support.functions.group_chain import logits_by_plan, tokens_of
from tests.support.functions.native_models import BUDGET, CUT, checkpoint, config, torch_groups
from tests.support.storage import tiny_models

TEXTS: Final = {"a": tokens_of(1, 30), "b": tokens_of(2, 21)}
PLAN: Final = {"a": (1, 20, 9), "b": (3, 1, 17)}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Empty folders for the cache and for the user's cache."""
    monkeypatch.setattr(compiler, "_CACHE", tmp_path / "beside")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of-user"))
    yield tmp_path
    library.library.cache_clear()


def fake(monkeypatch: pytest.MonkeyPatch, found: "Compiler | None", calls: list[Path]) -> None:
    def compiled(_: Compiler, into: Path, flags: tuple[str, ...] = ()) -> None:
        calls.append(into)
        into.write_bytes(b"library")

    monkeypatch.setattr(Compiler, "found", lambda: found)
    monkeypatch.setattr(Compiler, "compile", compiled)


def test_cc_takes_precedence_over_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{sys.executable} -s")
    found = Compiler.found()
    assert found is not None
    assert found.command == (sys.executable, "-s")
    assert found.version.startswith("Python")
    monkeypatch.delenv("CC")
    of_package = Compiler.found()
    assert of_package is not None
    assert of_package.command[:4] == (sys.executable, "-m", "ziglang", "cc")


def test_a_missing_or_failing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(CompilationFailed, match="no-such-compiler cannot be run"):
        compiler.library_file()
    monkeypatch.setenv("CC", f"{sys.executable}")
    with pytest.raises(CompilationFailed, match="-ffp-contract=off"):
        compiler.library_file()
    assert not list((elsewhere / "beside").iterdir()), "no half a file is left"


def test_it_is_compiled_once_for_each_source_and_compiler(monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> None:
    calls: list[Path] = []
    fake(monkeypatch, Compiler(("cc",), "1"), calls)
    first = compiler.library_file()
    assert first.parent == elsewhere / "beside"
    assert compiler.library_file() == first
    assert len(calls) == 1
    fake(monkeypatch, Compiler(("cc",), "2"), calls)
    assert compiler.library_file() != first
    copy = elsewhere / "source"
    shutil.copytree(compiler.SOURCE, copy)
    (copy / "row.inc.h").write_text((copy / "row.inc.h").read_text() + "\n")
    monkeypatch.setattr(compiler, "SOURCE", copy)
    assert compiler.library_file() != first
    assert len(calls) == 3


def test_a_cached_library_is_used_without_a_compiler(monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> None:
    fake(monkeypatch, Compiler(("cc",), "1"), [])
    made = compiler.library_file()
    fake(monkeypatch, None, [])
    assert compiler.library_file() == made
    made.unlink()
    with pytest.raises(NoCompiler, match="pip install ziglang"):
        compiler.library_file()


def test_the_users_folder_is_used_if_the_source_is_read_only(monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> None:
    fake(monkeypatch, Compiler(("cc",), "1"), [])
    (elsewhere / "beside").write_text("a file, in which no folder can be made, not by root either")
    made = compiler.library_file()
    assert made.parent == elsewhere / "of-user" / "lamina"
    assert compiler.library_file() == made
    made.unlink()

    def read_only(*_: object, **__: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(CompilationFailed, match="can be written"):
        compiler.library_file()


def test_torch_runs_the_layers_if_nothing_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, elsewhere: Path
) -> None:
    wanted = logits_by_plan(torch_groups("llama", "bfloat16"), TEXTS, PLAN)
    library.library.cache_clear()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    whole = checkpoint("llama", "bfloat16")
    groups = [
        build_layer_group(
            "auto", config("llama"), raw(tiny_models.stage_tensors(whole, first, last)), first, last, "bfloat16", "cpu", BUDGET
        )
        for first, last in CUT
    ]
    assert {group.runs_by for group in groups} == {f"torch's operators: {NoCompiler()}"}
    assert torch.equal(logits_by_plan(groups, TEXTS, PLAN), wanted)
    assert "layers run by torch's operators, which is slower: no compiled library and no compiler" in caplog.text


def test_a_library_of_other_records_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "RECORDS", library.RECORDS[:-1])
    with pytest.raises(ImportError, match="are others than those"):
        library.Library(str(compiler.library_file()))


def test_layers_in_c_are_for_cpus_and_every_dtype_but_float16() -> None:
    model = decoder_of(tiny_models.tiny_config("llama"))
    for dtype in ("bfloat16", "int8", "float32", "q4"):
        assert native_obstacle(model, dtype, "cpu") is None
        assert native_obstacle(model, dtype, "meta") == "they are on meta"
    assert native_obstacle(model, "float16", "cpu") == "float16 is not float32, bfloat16, int8, q4 or kept"
