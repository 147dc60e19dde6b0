"""Store → tensors, one way after the other, several times round: what the network of a machine, or its kernel, adds is fair."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from bench.coldstart.contenders import CONTENDERS, Job, Loaded
from storage.models.model_repository import ModelManifest, encode_manifest
from storage.store.settings import StoreSettings


def measure_loading(
    settings: StoreSettings, manifest: ModelManifest, cache: Path, rounds: int, tell: Callable[[str], None]
) -> dict[str, list[Loaded]]:
    """Every contender `rounds` times, each time in a new process."""
    store = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    job = msgspec.json.encode(Job(store, encode_manifest(manifest).decode(), str(cache)))
    _run("lamina_cached", job)  # fills the cache
    figures: dict[str, list[Loaded]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            figures[name].append(_run(name, job))
            tell(f"{name}: {figures[name][-1].seconds:.2f} s")
    return figures


def _run(name: str, job: bytes) -> Loaded:
    command = [sys.executable, "-m", "bench.coldstart.contenders", name]
    ended = subprocess.run(command, input=job, stdout=subprocess.PIPE, check=True, timeout=300)
    return msgspec.json.decode(ended.stdout, type=Loaded)
