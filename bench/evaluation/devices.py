"""Devices by their published figures, and what of those a pass is assumed to reach."""

from pathlib import Path
from typing import Annotated, Final

import msgspec

_DEVICES: Final = Path(__file__).with_name("devices.yaml")
_Rate = Annotated[float, msgspec.Meta(gt=0)]
_Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class UnknownDevice(ValueError):
    """No device of that name. The message lists those that there are."""


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    flops_per_second: _Rate  # of bf16, dense, as published
    bandwidth_bytes_per_second: _Rate  # of its memory, as published
    memory_bytes: _Rate
    flops_share: _Share = 0.5
    bandwidth_share: _Share = 0.75
    pass_seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.001
    """Of the host, before the first and behind the last kernel of a pass."""
    layer_seconds: Annotated[float, msgspec.Meta(ge=0)] = 20e-6
    """Of launches that graphs do not hide, for each layer."""


def read_device(name: str, path: Path = _DEVICES) -> Device:
    """Raises UnknownDevice, or msgspec.ValidationError that names the figure."""
    found = msgspec.yaml.decode(path.read_bytes(), type=dict[str, Device])
    if name not in found:
        raise UnknownDevice(f"device {name!r}: there is {', '.join(found)}; add its published figures to {path.name}")
    return found[name]
