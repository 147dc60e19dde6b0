"""One way of getting a stage's weights out of the store, once, in a process of its own; prints the seconds that took.

    python -m bench.coldstart.contenders NAME < job.json

Imports are done before the clock starts, and every way ends with the same tensors in memory (`plain_gets` with nothing).
"""

import mmap
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from storage.models.model_repository import ModelManifest, decode_manifest
from storage.store.settings import StoreSettings
from storage.store.signing import object_path, signed_headers

_CONNECTIONS: Final = 4
_BUFFER_BYTES: Final = 2**20


class Job(msgspec.Struct):
    """What to load from where."""

    store: dict[str, str]
    """The fields of StoreSettings."""
    manifest: str
    cache: str
    """A folder."""

    @property
    def settings(self) -> StoreSettings:
        return StoreSettings(**self.store)

    def decoded(self) -> ModelManifest:
        return decode_manifest(self.manifest.encode(), "manifest.json")


class Loaded(msgspec.Struct, frozen=True):
    """What is printed."""

    seconds: float
    cpu_seconds: float
    tensors: int


Load = Callable[[], object]


def lamina(job: Job) -> Load:
    """The project's loader, as a stage calls it: verified, into the memory of tensors."""
    return _loader(job, cached=False)


def lamina_cached(job: Job) -> Load:
    """The same with a folder of verified objects from an earlier start, in the page cache."""
    return _loader(job, cached=True)


def _loader(job: Job, *, cached: bool) -> Load:
    import torch

    from storage.loading.weight_cache import WeightCache
    from storage.loading.weight_loader import load_layers
    from storage.store.object_reader import ObjectReader

    manifest, reader = job.decoded(), ObjectReader(job.settings)
    cache = WeightCache(Path(job.cache), 2**34) if cached else None

    def load() -> object:
        raw = load_layers(reader, manifest, 0, manifest.num_layers, cache=cache)
        return {name: torch.frombuffer(each.data, dtype=torch.bfloat16).view(each.shape) for name, each in raw.items()}

    return load


def plain_gets(job: Job) -> Load:
    """The same ranged GETs into one buffer of the stage's size that is thrown away: no verification, no tensors."""
    total = sum(stored.bytes for stored in job.decoded().objects.values())
    # Pages that the kernel finds when they are written, as those of any new memory.
    buffer = memoryview(mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    return _gets(job, lambda start, end: buffer[start:end])


def plain_gets_small_buffer(job: Job) -> Load:
    """The same, over and over into 1 MiB for each connection, which the processor's cache holds: no memory at all."""
    small = threading.local()

    def place(start: int, end: int) -> memoryview:
        if not hasattr(small, "buffer"):
            small.buffer = memoryview(bytearray(_BUFFER_BYTES))
        buffer: memoryview = small.buffer
        return buffer[: end - start]

    return _gets(job, place)


def _gets(job: Job, place: Callable[[int, int], memoryview]) -> Load:
    """place: where the stage's bytes from `start` to `end` go; may be shorter."""
    settings, endpoint = job.settings, urlsplit(job.settings.endpoint_url)
    parts, offset = deque[tuple[str, int, int, int]](), 0
    for stored in job.decoded().objects.values():
        for start in range(0, stored.bytes, stored.part_bytes):
            parts.append((stored.key, start, min(start + stored.part_bytes, stored.bytes), offset + start))
        offset += stored.bytes

    def read(connection: HTTPConnection, key: str, start: int, end: int, at: int) -> None:
        path = object_path(settings, key)
        headers = signed_headers(settings, "GET", path) | {"range": f"bytes={start}-{end - 1}"}
        connection.request("GET", path, headers=headers)
        with connection.getresponse() as response:
            while start < end:
                count = response.readinto(place(at, min(at + _BUFFER_BYTES, at + end - start)))
                start, at = start + count, at + count
            response.read(1)

    def read_all() -> None:
        connection = HTTPConnection(endpoint.hostname or "", endpoint.port)
        while True:
            try:
                part = parts.popleft()
            except IndexError:
                break
            read(connection, *part)
        connection.close()

    def load() -> object:
        threads = [threading.Thread(target=read_all) for _ in range(_CONNECTIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return None

    return load


def boto3_download(job: Job) -> Load:
    """boto3's `download_file`, as it comes, into a file in memory; then `load_file`. What most servers do."""
    import boto3
    from botocore.config import Config
    from safetensors.torch import load_file

    settings, manifest = job.settings, job.decoded()
    client = boto3.client(
        "s3",
        endpoint_url=settings.endpoint_url,
        region_name=settings.region,
        aws_access_key_id=settings.access_key_id,
        aws_secret_access_key=settings.secret_access_key,
        config=Config(signature_version="s3v4", response_checksum_validation="when_required"),
    )

    def load() -> object:
        tensors = {}
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            for name, stored in manifest.objects.items():
                file = f"{folder}/{name}.safetensors"
                client.download_file(settings.bucket, stored.key, file)
                # A mapped tensor has not been read yet; a copy has.
                tensors.update({key: tensor.clone() for key, tensor in load_file(file).items()})
        return tensors

    return load


def runai_streamer(job: Job) -> Load:
    """runai-model-streamer, as it comes."""
    import os

    settings, manifest = job.settings, job.decoded()
    os.environ.update(
        AWS_ENDPOINT_URL=settings.endpoint_url,
        AWS_ACCESS_KEY_ID=settings.access_key_id or "",
        AWS_SECRET_ACCESS_KEY=settings.secret_access_key or "",
        AWS_REGION=settings.region,
        RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING="0",
        RUNAI_STREAMER_LOG_LEVEL="WARNING",
    )
    from runai_model_streamer import SafetensorsStreamer

    urls = [f"s3://{settings.bucket}/{stored.key}" for stored in manifest.objects.values()]

    def load() -> object:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(urls)
            return dict(streamer.get_tensors())

    return load


CONTENDERS: Final[Mapping[str, Callable[[Job], Load]]] = {
    each.__name__: each for each in (lamina, lamina_cached, plain_gets, plain_gets_small_buffer, boto3_download, runai_streamer)
}


def main(name: str) -> None:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    load = CONTENDERS[name](job)
    cpu, began = time.process_time(), time.perf_counter()
    loaded: Any = load()
    seconds = time.perf_counter() - began
    print(
        msgspec.json.encode(
            {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "tensors": len(loaded or ())}
        ).decode()
    )


if __name__ == "__main__":
    main(sys.argv[1])
