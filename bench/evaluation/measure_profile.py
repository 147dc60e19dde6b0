"""Measures the profile of a stage that runs alone on this machine: native layers, one thread.

    python -m bench.evaluation.measure_profile --dtype bfloat16 --output bench/evaluation/profiles/smollm2-bfloat16.yaml

Steps with many rows and several lengths of keys and values determine the cost of bytes, prompt chunks that of arithmetic, and
groups of two sizes the shares of a pass and of a layer. Each point is the best of several passes; all take less than a minute.
The published model is read from the state folder of `bench.load`, or published there.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import msgspec
import numpy as np
from rich.console import Console

from bench.evaluation.fitting import Point, fit_profile
from bench.report import help_text, machine
from functions.stage.models.build import build_layer_group
from functions.stage.models.floats import DTYPES
from functions.stage.models.layer_group import LayerGroup, Segment
from knative.commands.local_pipeline import ensure_published
from knative.commands.options import STORE_FOLDER
from knative.local.platform import ROOT
from storage.loading.weight_loader import RawTensor, iterate_layers
from storage.models.model_repository import ModelManifest, read_file
from storage.store.embedded import EmbeddedStore
from storage.store.object_reader import ObjectReader
from storage.store.object_store import ObjectStore

LAYERS: Final = (4, 12)
ROWS: Final = (1, 4, 16)
HELD: Final = (64, 512)
CHUNKS: Final = (64, 256)
_KV_BYTES: Final = 2**28
_PASSES: Final = 9


def _points(group: LayerGroup) -> Iterator[Point]:
    layers = group.last_layer - group.first_layer
    for position in HELD:
        for rows, length in (*((rows, 1) for rows in ROWS), *((1, length) for length in CHUNKS)):
            yield Point(layers, rows, length, position, _best(group, rows, length, position))


def _best(group: LayerGroup, rows: int, length: int, position: int) -> float:
    handles = [group.kv.reserve(position + length) for _ in range(rows)]
    for handle in handles:
        group.forward(_hidden(group, position), [Segment(handle, 0, position)])
    inputs = _hidden(group, rows * length)
    seconds = float("inf")
    for _ in range(_PASSES):
        seconds = min(seconds, _timed(lambda: group.forward(inputs, [Segment(each, position, length) for each in handles])))
        for handle in handles:
            group.kv.truncate(handle, position)
    for handle in handles:
        group.kv.release(handle)
    return seconds


def _hidden(group: LayerGroup, tokens: int) -> np.ndarray[Any, Any]:
    return np.full((tokens, group.hidden_size), 0x3D00, DTYPES[group.hidden_dtype])


def _timed(work: Callable[[], object]) -> float:
    """Processor time, without waiting for a processor."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def _group(reader: ObjectReader, manifest: ModelManifest, first: int, last: int) -> LayerGroup:
    config = msgspec.json.decode(read_file(reader, manifest, "config.json"), type=dict[str, Any])
    tensors: dict[str, RawTensor] = {}
    for loaded in iterate_layers(reader, manifest, first, last):
        tensors |= loaded.tensors
    group = build_layer_group("native", config, tensors, first, last, manifest.dtype, "cpu", _KV_BYTES)
    group.use_threads(1)
    return group


@click.command(help=help_text(__doc__))
@click.option("--dtype", type=click.Choice(["bfloat16", "int8", "q4"]), default="bfloat16", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), required=True)
def main(dtype: str, output: Path) -> None:
    with EmbeddedStore(ROOT / ".lamina" / "load" / STORE_FOLDER) as embedded:
        manifest = ensure_published(ObjectStore(embedded.settings), None, dtype, Console())
        reader = ObjectReader(embedded.settings)
        count = manifest.num_layers
        points = [point for layers in LAYERS for point in _points(_group(reader, manifest, 1, 1 + layers))]
        last = _group(reader, manifest, count - 1, count)
        heads = [(rows, min(_timed(partial(last.logits, _hidden(last, rows))) for _ in range(_PASSES))) for rows in ROWS]
    profile = fit_profile(points, heads, manifest.name, f"native layers in {dtype}, one thread, {machine()}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(msgspec.yaml.encode(profile))
    for point in points:
        what = f"{point.layers:3} layers {point.rows:3} x {point.length:3} behind {point.position:4}"
        click.echo(f"{what}: {point.seconds * 1e3:8.2f} ms")
    click.echo(f"{output}: fitted within {profile.worst_error:.0%}")


if __name__ == "__main__":
    main()
