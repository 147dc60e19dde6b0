"""Where layers run in machine code and where they do not, for which CPU it is made, and where it is kept."""

import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from llvmlite import binding

from functions.stage.models.llama.config import LlamaConfig
from functions.stage.models.llama.kv_pool import KVPool
from functions.stage.models.llama.native_choice import native_layers
from functions.stage.native import machine_code, target
from tests.support.functions.group_chain import GroupChain, by_plan, tokens_of
from tests.support.functions.native_models import (
    built_groups,
    checkpoint,
    config,
    error,
    exact_groups,
    native_groups,
    torch_groups,
)
from tests.support.paths import ROOT

TEXTS: Final = {"a": tokens_of(1, 30), "b": tokens_of(2, 21), "c": tokens_of(3, 6)}
PLAN: Final = {"a": (1, 20, 9), "b": (3, 1, 17), "c": (0, 1, 5)}
IS_X86_64: Final = platform.machine().lower() in {"x86_64", "amd64"}


def chosen(dtype: str, device: str = "cpu", **changes: Any) -> bool:
    model = LlamaConfig.from_dict({**config("llama"), **changes})
    pool = KVPool(model.num_layers, model.num_kv_heads, model.head_dim, torch.bfloat16, torch.device(device), 2**16)
    return native_layers(model, 0, dtype, pool) is not None


def test_machine_code_is_for_bfloat16_and_int8_in_sizes_of_whole_vectors_on_cpus() -> None:
    assert chosen("bfloat16")
    assert chosen("int8")
    assert not chosen("float32")
    assert not chosen("float16")
    assert not chosen("bfloat16", device="meta")
    for field in ("hidden_size", "intermediate_size", "head_dim"):
        assert not chosen("bfloat16", **{field: config("llama")[field] + 16})


@pytest.mark.parametrize("lacking", ["numba", "libgomp.so.1", "RTLD_NOLOAD"])
def test_torch_runs_the_layers_where_something_is_lacking(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lacking: str
) -> None:
    wanted = logits_of(torch_groups("llama", "bfloat16"))
    hide(monkeypatch, lacking)
    groups = built_groups("llama", "bfloat16")
    assert all(group._native is None for group in groups)
    assert torch.equal(logits_of(groups), wanted)
    assert "layers run by torch's operators, which is slower" in caplog.text
    assert lacking in caplog.text


def hide(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    def no_library(name: str, **_: int) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    if lacking == "numba":
        adapter = "functions.stage.models.llama.native_layers"
        for module in [name for name in sys.modules if name == adapter or name.startswith("functions.stage.native.")]:
            monkeypatch.delitem(sys.modules, module)
            monkeypatch.delattr(module)
        monkeypatch.setitem(sys.modules, "numba", None)
    elif lacking == "RTLD_NOLOAD":
        monkeypatch.delattr("os.RTLD_NOLOAD")  # as on macOS
    else:
        monkeypatch.setattr("ctypes.CDLL", no_library)


def logits_of(groups: Any) -> torch.Tensor:
    chain = GroupChain(groups)
    chain.reserve(*TEXTS)
    return torch.cat(list(by_plan(chain.logits, TEXTS, PLAN).values()))


AVX512: Final = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
AVX2: Final = {"avx2", "bmi2", "f16c", "fma"}


def has_avx2() -> bool:
    features = binding.get_host_cpu_features()
    return all(features.get(feature) for feature in AVX2)


@pytest.mark.parametrize(
    ("features", "level"),
    [
        (AVX2 | AVX512 | {"avx512vnni", "avx512bf16"}, target.LEVELS[0]),
        (AVX2 | AVX512 | {"avx512vnni"}, target.LEVELS[1]),
        (AVX2 | AVX512 | {"avx512bf16"}, target.LEVELS[2]),
        ((AVX2 | AVX512) - {"avx512dq"}, target.LEVELS[3]),
        (AVX2 - {"fma"}, target.Target(None, None)),
    ],
)
def test_the_target_is_the_best_level_that_the_cpu_has_all_of(
    monkeypatch: pytest.MonkeyPatch, features: set[str], level: target.Target
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: dict.fromkeys(features, True))
    assert target.of_this_machine() == level


def test_another_kind_of_cpu_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert target.of_this_machine() == target.Target(None, None)


OF_JOBS: Final = """
import sys
import torch
given, into = sys.argv[-2:]
from functions.stage.models.layer_group import Segment
from functions.stage.models.llama.group import LlamaGroup
results = []
for dtype, config, tensors, passes in torch.load(given):
    group = LlamaGroup.build(config, tensors, 0, 6, dtype, "cpu", 2**20)
    assert group._native is not None
    handles = [group.kv.reserve(40) for _ in range(3)]
    for inputs, segments in passes:
        hidden = group.forward(inputs, [Segment(handles[which], position, length) for which, position, length in segments])
        results.append(group.logits(hidden))
torch.save(results, into)
"""
# Runs in a process of its own, as numba chooses its target once.
RUN_FOR_TARGET: Final = f"""
import logging, sys
from functions.stage.native import target
cpu, features = sys.argv[1:3]
target.of_this_machine = lambda: target.Target(cpu, features)
logging.basicConfig(level=logging.INFO, format="%(message)s")
{OF_JOBS}"""


def run_for_target(folder: Path, level: target.Target, source: Path = ROOT) -> tuple[list[torch.Tensor], str]:
    """What the process computes of `jobs()`, and what it says."""
    torch.save(jobs(), folder / "jobs")
    command = [sys.executable, "-c", RUN_FOR_TARGET, level.cpu or "", level.features or "", folder / "jobs", folder / "results"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results"), done.stderr


def jobs() -> list[tuple[str, dict[str, Any], dict[str, torch.Tensor], list[Any]]]:
    passes = []
    given = dict.fromkeys(TEXTS, 0)
    for lengths in zip(*PLAN.values(), strict=True):
        parts = [(which, id, length) for (which, id), length in zip(enumerate(TEXTS), lengths, strict=True) if length]
        tokens = [token for _, id, length in parts for token in TEXTS[id][given[id] : given[id] + length]]
        passes.append((torch.tensor(tokens), [(which, given[id], length) for which, id, length in parts]))
        for _, id, length in parts:
            given[id] += length
    return [(dtype, config(name), checkpoint(name, dtype), passes) for name, dtype in MODELS]


MODELS: Final = (("llama_biased", "bfloat16"), ("llama_biased", "int8"), ("qwen3", "bfloat16"), ("mistral_sliding", "int8"))


def assert_right(results: list[torch.Tensor]) -> None:
    """Nearer to float32 than torch's layers in bfloat16, and much nearer to the code in use here: sums differ in order."""
    passes = len(results) // len(MODELS)
    for number, (name, dtype) in enumerate(MODELS):
        found = torch.cat(results[number * passes : (number + 1) * passes])
        here, exact, by_torch = (
            in_passes(groups)
            for groups in (
                native_groups(name, dtype, ((0, 6),)),
                exact_groups(name, dtype),
                torch_groups(name, "bfloat16"),
            )
        )
        assert error(found, exact) < error(by_torch, exact)
        assert error(found, here) < error(by_torch, exact) / 4


def in_passes(groups: Any) -> torch.Tensor:
    """The logits in the order of `jobs`: pass by pass."""
    chain = GroupChain(groups)
    chain.reserve(*TEXTS)
    parts = {
        id: part.split([length for length in PLAN[id] if length]) for id, part in by_plan(chain.logits, TEXTS, PLAN).items()
    }
    rest = {id: iter(pieces) for id, pieces in parts.items()}
    ordered = [next(rest[id]) for lengths in zip(*PLAN.values(), strict=True) for id, n in zip(PLAN, lengths, strict=True) if n]
    return torch.cat(ordered)


@pytest.mark.skipif(not IS_X86_64, reason="levels are those of x86-64")
def test_code_for_any_cpu_of_x86_64_computes_the_same(tmp_path: Path) -> None:
    assert_right(run_for_target(tmp_path, target.Target("x86-64", ""))[0])


@pytest.mark.skipif(not IS_X86_64 or not has_avx2(), reason="no AVX2")
def test_code_made_ahead_for_avx2_is_what_a_stage_uses_and_computes_the_same(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "functions", source / "functions", ignore=shutil.ignore_patterns("machine-code-*"))
    level = target.LEVELS.index(target.Target("x86-64-v3", ""))
    ahead = [sys.executable, "-m", "functions.stage.native", "--level", str(level)]
    done = subprocess.run(ahead, cwd=source, capture_output=True, text=True, timeout=200, check=True)
    assert "compiled the layers for x86-64-v3" in done.stderr
    results, said = run_for_target(tmp_path, target.LEVELS[level], source)
    assert "compiled" not in said
    assert_right(results)


# Torch and the code come ahead of the fork, as where pods are forked.
RUN_FORKED: Final = f"""
import os, sys
import torch
from functions.stage.native import preloaded
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
{OF_JOBS}"""


def test_code_loaded_ahead_of_a_fork_is_that_of_the_children(tmp_path: Path) -> None:
    torch.save(jobs(), tmp_path / "jobs")
    command = [sys.executable, "-c", RUN_FORKED, tmp_path / "jobs", tmp_path / "results"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert_right(torch.load(tmp_path / "results"))


@pytest.mark.skipif(not IS_X86_64, reason="levels are those of x86-64")
def test_the_target_is_selected_before_numba_chooses_one() -> None:
    """Or code would be made for the CPU at hand, and looked up as that of its level and of that CPU."""
    code = """
from functions.stage.native import machine_code, target
from functions.stage.models.llama import native_choice as choice
from functions.stage.models.llama import native_layers as layers
target.of_this_machine = lambda: target.Target("x86-64", "+sse3")
machine_code.cfunc = lambda *_, **__: lambda function: type("Compiled", (), {"cache_hits": 1, "address": 1})
machine_code.for_this_machine()
from numba.core.registry import cpu_target
print(*cpu_target.target_context.codegen().magic_tuple()[1:])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["x86-64", "+sse3"]


def test_another_source_has_another_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(machine_code._FOLDER, tmp_path, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    digest = machine_code._digest()
    monkeypatch.setattr(machine_code, "_FOLDER", tmp_path)
    assert machine_code._digest() == digest
    with machine_code._cache_folder() as first:
        assert first == tmp_path / "__pycache__" / f"machine-code-{digest}"
    (tmp_path / "vector_code.py").write_text((tmp_path / "vector_code.py").read_text() + "\n")
    with machine_code._cache_folder() as second:
        assert second.is_dir()
    assert second.parent == first.parent
    assert second != first


def test_where_nothing_can_be_written_what_is_kept_is_used_from_a_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine_code, "_FOLDER", tmp_path)
    with machine_code._cache_folder() as kept:
        (kept / "native").mkdir()
        (kept / "native" / "code.nbc").write_bytes(b"code")

    def read_only(*_: object, **__: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with machine_code._cache_folder() as copy:
        assert not copy.is_relative_to(tmp_path)
        assert (copy / "native" / "code.nbc").read_bytes() == b"code"
    assert not copy.exists()
    assert (kept / "native" / "code.nbc").exists()


def test_where_no_folder_can_be_made_code_is_compiled_into_one_that_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "__pycache__").write_text("a file, in which no folder can be made, not by root either")
    monkeypatch.setattr(machine_code, "_FOLDER", tmp_path)
    with machine_code._cache_folder() as folder:
        assert folder.is_dir()
        assert not list(folder.iterdir())
    assert not folder.exists()
