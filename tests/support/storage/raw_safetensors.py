"""Writes safetensors files of any dtype from raw bytes."""

import json
from collections.abc import Mapping
from pathlib import Path

Raw = tuple[str, tuple[int, ...], bytes]  # dtype, shape, bytes


def save_raw(path: Path, tensors: Mapping[str, Raw], metadata: Mapping[str, str] | None = None) -> None:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + len(data))}
        end += len(data)
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(data for _, _, data in tensors.values()))
