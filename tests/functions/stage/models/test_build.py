"""The choice of a layer group, the libraries that it imports, and the group that sleeps."""

import json
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from functions.configuration.pass_times import PassTimes
from functions.stage.engine.wire_tensors import hidden_array, wire_tensor
from functions.stage.models import build, sleep_group
from functions.stage.models.build import GroupChoice, Kind, UnsupportedDtype, build_layer_group, choose, device_for
from functions.stage.models.kv_cache import KVBudget, KVCacheFull
from functions.stage.models.layer_group import LayerGroup, Segment
from storage.checkpoints.decoder_families import UnsupportedConfig
from storage.errors import LibraryMissing
from tests.support.functions.stage_pipeline import CUT, build_groups, engines, generate, stage_tensors, tensors, whole_model
from tests.support.paths import ROOT
from tests.support.storage import tiny_models

PROMPT = [5, 9, 33, 7, 100, 3, 8]

BUILD = """
import json, sys
import pickle
from storage.loading.weight_loader import RawTensor
from functions.stage.models.build import build_layer_group
from functions.stage.engine.engine import Engine
folder, kind = sys.argv[1:]
config = json.load(open(f"{folder}/config.json"))
arrays = pickle.load(open(f"{folder}/arrays", "rb"))
tensors = {name: RawTensor("F32", array.shape, array.data.cast("B")) for name, array in arrays.items()}
group = build_layer_group(kind, config, tensors, 0, 2, "float32", "cpu", 2**20)
engine = Engine(group, num_stages=3, max_merge=8, idle_sequence_seconds=60)
engine.start()
engine.warm_up()
engine.stop()
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def modules_loaded(name: str, kind: str, folder: Path) -> set[str]:
    """Top-level modules of a process that built the first stage and ran one step."""
    (folder / "config.json").write_text(json.dumps(tiny_models.tiny_config(name)))
    arrays = {name: tensor.numpy() for name, tensor in tiny_models.stage_tensors(tensors(name), 0, 2).items()}
    (folder / "arrays").write_bytes(pickle.dumps(arrays))
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder), kind], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(("name", "kind"), [("llama", "auto"), ("qwen3", "auto"), ("llama", "native"), ("llama", "sleep")])
def test_a_native_stage_imports_few_packages_besides_numpy(name: str, kind: str, tmp_path: Path) -> None:
    packages = modules_loaded(name, kind, tmp_path) - sys.stdlib_module_names
    packages = {package for package in packages if not package.startswith("_")}
    assert packages <= {
        "functions",
        "eventing",
        "storage",
        "numpy",
        "msgspec",
        "cloudevents",
        "blake3",
        "dateutil",
        "six",
        "typing_extensions",
    }


def test_torchs_operators_need_torch_alone(tmp_path: Path) -> None:
    loaded = modules_loaded("llama", "llama", tmp_path)
    assert "torch" in loaded
    assert not loaded & {"transformers", "boto3", "flask", "prometheus_client"}


@pytest.mark.parametrize(
    ("library", "name", "dtype", "device", "what"),
    [
        ("torch", "gptj", "float32", "auto", "a gptj model in float32 on cpu"),
        ("torch", "llama", "float16", "auto", "a llama model in float16 on cpu"),
        ("torch", "llama", "bfloat16", "cuda", "a llama model in bfloat16 on cuda"),
        ("transformers", "gptj", "float32", "auto", "a gptj model in float32 on cpu"),
    ],
)
def test_a_missing_library_is_named_if_a_model_needs_it(
    library: str, name: str, dtype: str, device: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert choose("auto", tiny_models.tiny_config("llama"), "float32", "auto") == GroupChoice("native", "cpu")
    with pytest.raises(LibraryMissing, match=rf"^{what} .*takes {library}, which is not installed here .*target `full`"):
        choose("auto", tiny_models.tiny_config(name), dtype, device)


def test_requesting_native_layers_that_cannot_run_is_refused() -> None:
    with pytest.raises(UnsupportedConfig, match="the layers do not run in C: float16 is not"):
        choose("native", tiny_models.tiny_config("llama"), "float16", "cpu")
    with pytest.raises(UnsupportedConfig, match="gptj"):
        choose("native", tiny_models.tiny_config("gptj"), "float32", "cpu")


def test_other_families_run_on_transformers(tmp_path: Path) -> None:
    assert "transformers" in modules_loaded("gptj", "auto", tmp_path)


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_models_of_the_table_run_in_c_and_no_others(name: str) -> None:
    kind = choose("auto", tiny_models.tiny_config(name), "float32", "cpu").kind
    assert kind == ("native" if name in tiny_models.NATIVE else "transformers")


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_torchs_operators_run_what_differs_little_from_llama(name: str) -> None:
    kind = choose("auto", tiny_models.tiny_config(name), "float16", "cpu").kind
    assert kind == ("llama" if name in tiny_models.LLAMA_SHAPED else "transformers")


def test_configs_that_the_llama_groups_decline_go_to_transformers() -> None:
    odd = tiny_models.tiny_config("llama", hidden_act="relu6")
    assert choose("auto", odd, "float32", "cpu").kind == "transformers"
    stage = stage_tensors("llama", 2, 4)
    group = build_layer_group("auto", odd, stage, 2, 4, "float32", "cpu", 2**20)
    assert type(group).__name__ == "TransformersGroup"


@pytest.mark.parametrize(
    ("configured", "dtype", "has_gpu", "device"),
    [
        ("auto", "bfloat16", True, "cuda"),
        ("auto", "bfloat16", False, "cpu"),
        ("auto", "int8", True, "cpu"),
        ("auto", "q4", True, "cpu"),
        ("cpu", "float32", True, "cpu"),
        ("cuda", "float32", False, "cuda"),
    ],
)
def test_auto_takes_the_device_that_runs_the_dtype(
    configured: str, dtype: str, has_gpu: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_GPU_FILES", ("/dev/null",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert device_for(configured, dtype) == device


@pytest.mark.parametrize(("kind", "head_dim", "why"), [("auto", 1026, "head_dim 1026 is over 1024"), ("llama", 8, "llama was")])
def test_q4_runs_in_c_or_not_at_all(kind: Kind, head_dim: int, why: str) -> None:
    with pytest.raises(UnsupportedDtype, match=f"q4 runs by layers in C alone, and here they do not: {why}"):
        choose(kind, tiny_models.tiny_config("llama", head_dim=head_dim), "q4", "cpu")


@pytest.mark.parametrize("name", ["ministral", "seed_oss"])
def test_recently_added_families_run_in_c(name: str) -> None:
    """Families that run in C were once in two lists, and these were missing from one."""
    groups = build_groups(name, kind="auto")
    assert {type(group).__name__ for group in groups} == {"NativeGroup"}
    with engines(groups) as stages:
        assert generate(stages, "a", PROMPT, 16, chunk=3) == tiny_models.greedy(whole_model(name), PROMPT, 16)


def test_native_transformers_and_torchs_stages_can_be_mixed_in_one_pipeline() -> None:
    native, other, torchs = (build_groups("llama", kind=kind) for kind in ("native", "transformers", "llama"))
    with engines([native[0], other[1], torchs[2]]) as stages:
        assert generate(stages, "a", PROMPT, 10) == tiny_models.greedy(whole_model("llama"), PROMPT, 10)


def sleeping(first: int, last: int, times: PassTimes | None = None, **changes: Any) -> LayerGroup:
    config = tiny_models.tiny_config("llama", **changes)
    return build_layer_group("sleep", config, {}, first, last, "bfloat16", "cpu", 2**20, sleep_times=times)


def test_sleeping_stages_answer_the_token_they_were_given() -> None:
    with engines(build_groups("llama", kind="sleep")) as stages:
        for last in (7, 100, 127):
            assert generate(stages, str(last), [1, 2, last], 5, chunk=2) == [last] * 5


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds for which sleeping groups would have slept."""
    seconds: list[float] = []
    monkeypatch.setattr(sleep_group, "time", SimpleNamespace(sleep=seconds.append))
    return seconds


def test_a_sleeping_pass_takes_its_time_whatever_its_size(slept: list[float]) -> None:
    group = sleeping(2, 4, PassTimes(fixed_seconds=0.05))
    handles = [group.kv.reserve(20) for _ in range(3)]
    hidden = group.forward(np.zeros((30, 32), np.uint16), [Segment(handle, 0, 10) for handle in handles])
    assert slept == [0.05]
    assert hidden.shape == (30, 32)
    assert [group.kv.length(handle) for handle in handles] == [10] * 3


def test_an_emulated_pass_takes_as_long_as_its_device_would(slept: list[float]) -> None:
    """A prompt takes arithmetic, a step over many held tokens takes bandwidth, and the last stage has a head."""
    times = PassTimes(
        fixed_seconds=0.01,
        token_seconds=0.001,
        pair_seconds=0.0001,
        stream_seconds=0.02,
        kv_token_seconds=0.001,
        logits_row_seconds=0.01,
        logits_stream_seconds=0.03,
    )
    group = sleeping(2, 6, times)
    handle = group.kv.reserve(100)
    for position, length in ((0, 60), (60, 1)):
        group.forward(np.zeros((length, 32), np.uint16), [Segment(handle, position, length)])
    group.logits(np.zeros((5, 32), np.uint16))
    assert slept == pytest.approx([0.01 + 0.06 + 60 * 30.5 * 0.0001, 0.01 + 0.02 + 0.061, 0.05])


def test_a_sleeping_group_accounts_for_kv_as_a_real_one() -> None:
    for first, last in CUT:
        config = tiny_models.tiny_config("llama")
        stage = stage_tensors("llama", first, last)
        real = build_layer_group("transformers", config, stage, first, last, "bfloat16", "cpu", 2**20)
        group = sleeping(first, last)
        assert group.kv.capacity_tokens == real.kv.capacity_tokens
        assert group.hidden_dtype == real.hidden_dtype


@pytest.mark.parametrize(
    ("kind", "name", "device", "why"),
    [
        ("auto", "falcon", "cpu", "do not run a .falcon."),
        ("auto", "llama", "cuda", "the layers do not run in C: they are on cuda"),
        ("transformers", "llama", "cpu", "and transformers was asked for"),
        ("llama", "llama", "cpu", "and llama was asked for"),
    ],
)
def test_keys_and_values_in_8_bits_run_in_c_or_not_at_all(kind: Kind, name: str, device: str, why: str) -> None:
    with pytest.raises(UnsupportedDtype, match=f"keys and values in int8 take layers in C.*{why}"):
        choose(kind, tiny_models.tiny_config(name), "bfloat16", device, kv_dtype="int8")
    assert choose("auto", tiny_models.tiny_config("llama"), "int8", "auto", kv_dtype="int8").kind == "native"


@pytest.mark.parametrize("wire_dtype", ["BF16", "I8"])
def test_sleeping_stages_carry_token_ids_of_a_large_vocabulary(wire_dtype: str) -> None:
    first, last = sleeping(0, 3, vocab_size=300_000), sleeping(3, 6, vocab_size=300_000)
    token_ids = np.array([0, 1, 127, 128, 49_151, 151_936, 299_999])
    hidden = first.forward(token_ids, [Segment(first.kv.reserve(7), 0, 7)])
    hidden = hidden_array(wire_tensor(hidden, first.hidden_dtype, wire_dtype), last.hidden_dtype)
    hidden = last.forward(hidden, [Segment(last.kv.reserve(7), 0, 7)])
    assert last.logits(hidden).argmax(axis=-1).tolist() == token_ids.tolist()


def test_a_budget_counts_reservations() -> None:
    kv = KVBudget(10)
    a, b = kv.reserve(4), kv.reserve(6)
    assert (kv.free_tokens, kv.reserved(b)) == (0, 6)
    with pytest.raises(KVCacheFull, match="1 tokens wanted, 0 free"):
        kv.reserve(1)
    kv.extend(a, 3)
    kv.truncate(a, 5)
    assert kv.length(a) == 3
    kv.truncate(a, 1)
    assert kv.length(a) == 1
    kv.release(a)
    c = kv.reserve(3)
    assert c != b
    assert (kv.length(c), kv.free_tokens) == (0, 1)


def test_sleeping_stages_work_at_the_same_time() -> None:
    """Eight micro-batches keep the slowest stage busy; walked one by one, a round would take the sum of all stages."""
    seconds = (0.01, 0.03, 0.01)
    groups = [sleeping(*cut, PassTimes(fixed_seconds=pause)) for cut, pause in zip(CUT, seconds, strict=True)]
    tokens = 5
    with engines(groups, max_merge=1) as stages, ThreadPoolExecutor(max_workers=8) as pool:
        began = time.perf_counter()
        answers = list(pool.map(lambda number: generate(stages, str(number), [number], tokens), range(8)))
        elapsed = time.perf_counter() - began
    assert answers == [[number] * tokens for number in range(8)]
    rounds = 8 * tokens
    assert elapsed < 0.8 * rounds * sum(seconds), "the stages worked one after the other"
    assert elapsed >= rounds * max(seconds)
