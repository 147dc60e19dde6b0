"""A profile: the time of a forward pass as a function of rows, prompt tokens, keys and values held, and layers.

It is computed from a device's published figures (a roofline), or fitted to a stage that was measured alone (`measure_profile`).
`of_stage` gives the figures of one group of layers, by which an emulated stage sleeps and the simulator computes.
"""

from pathlib import Path
from typing import Annotated, Final

import msgspec

from functions.configuration.pass_times import PassTimes
from knative.spec.model_shape import ModelShape

_DEVICES: Final = Path(__file__).with_name("devices.yaml")
_Rate = Annotated[float, msgspec.Meta(gt=0)]
_Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class UnknownDevice(ValueError):
    """No device has this name. The message lists the known ones."""


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    flops_per_second: _Rate  # of bf16, dense, as published
    bandwidth_bytes_per_second: _Rate  # of its memory, as published
    memory_bytes: _Rate
    flops_share: _Share = 0.5
    bandwidth_share: _Share = 0.75
    pass_seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.001  # of the host, before the first and after the last kernel
    layer_seconds: Annotated[float, msgspec.Meta(ge=0)] = 20e-6  # of launches that graphs do not hide, for each layer


def read_device(name: str) -> Device:
    """Raises UnknownDevice, or msgspec.ValidationError that names the figure."""
    found = msgspec.yaml.decode(_DEVICES.read_bytes(), type=dict[str, Device])
    if name not in found:
        raise UnknownDevice(f"device {name!r}: there is {', '.join(found)}; add its published figures to {_DEVICES.name}")
    return found[name]


_FLOPS_PER_MULTIPLY_ADD: Final = 2
_ATTENTION_MULTIPLY_ADDS: Final = 2  # per number of a query: one with the key, one with the value
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class DoesNotFit(ValueError):
    """A stage's weights and the minimum of keys and values exceed the device's memory. Cut into more stages."""


class ProfileInvalid(ValueError):
    """The file is no profile. The message names what is missing."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model in one dtype on one device. Names as in `PassTimes`; `layer_…` is for one layer."""

    model: str
    source: str  # how it was made, for people
    pass_seconds: _Seconds
    layer_seconds: _Seconds
    layer_token_seconds: _Seconds
    layer_pair_seconds: _Seconds
    layer_stream_seconds: _Seconds
    layer_stream_token_seconds: _Seconds = 0.0
    layer_kv_token_seconds: _Seconds
    head_row_seconds: _Seconds
    head_stream_seconds: _Seconds
    worst_error: _Seconds | None = None  # largest |fitted − measured| ÷ measured over the points of a measured profile

    def times(self, factor: float) -> "Profile":
        """The profile of a device that takes `factor` times as long."""
        seconds = {name: factor * getattr(self, name) for name in self.__struct_fields__ if name.endswith("_seconds")}
        return msgspec.structs.replace(self, source=f"{self.source}; {factor:g} times as long", **seconds)

    def of_stage(self, first: int, last: int, num_layers: int) -> PassTimes:
        layers, ends = last - first, last == num_layers
        return PassTimes(
            fixed_seconds=self.pass_seconds + layers * self.layer_seconds,
            token_seconds=layers * self.layer_token_seconds,
            pair_seconds=layers * self.layer_pair_seconds,
            stream_seconds=layers * self.layer_stream_seconds,
            stream_token_seconds=layers * self.layer_stream_token_seconds,
            kv_token_seconds=layers * self.layer_kv_token_seconds,
            logits_row_seconds=self.head_row_seconds if ends else 0.0,
            logits_stream_seconds=self.head_stream_seconds if ends else 0.0,
        )


def roofline(shape: ModelShape, device: Device, name: str) -> Profile:
    """Takes all layers to be like the first. name: of the device, for people."""
    per_flop = 1 / (device.flops_per_second * device.flops_share)
    per_byte = 1 / (device.bandwidth_bytes_per_second * device.bandwidth_share)
    return Profile(
        model=shape.name,
        source=(
            f"roofline of {name}: {device.flops_share:.0%} of {device.flops_per_second / 1e12:g} TFLOP/s, "
            f"{device.bandwidth_share:.0%} of {device.bandwidth_bytes_per_second / 1e9:g} GB/s, "
            f"{device.pass_seconds * 1e3:g} ms a pass and {device.layer_seconds * 1e6:g} µs a layer of launches"
        ),
        pass_seconds=device.pass_seconds,
        layer_seconds=device.layer_seconds,
        layer_token_seconds=_FLOPS_PER_MULTIPLY_ADD * shape.layer_compute[0] * per_flop,
        layer_pair_seconds=_FLOPS_PER_MULTIPLY_ADD * _ATTENTION_MULTIPLY_ADDS * shape.hidden_size * per_flop,
        layer_stream_seconds=shape.layer_bytes[0] * per_byte,
        layer_kv_token_seconds=shape.kv_values_per_layer * shape.value_bytes * per_byte,
        head_row_seconds=_FLOPS_PER_MULTIPLY_ADD * shape.head_compute * per_flop,
        head_stream_seconds=shape.head_bytes * per_byte,
    )


def read_profile(path: Path) -> Profile:
    """Raises ProfileInvalid, OSError."""
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=Profile)
    except msgspec.MsgspecError as error:
        raise ProfileInvalid(f"{path}: no profile: {error}; `python -m bench.evaluation.measure_profile` writes one") from error


def kv_tokens_beside(weight_bytes: int, kv_bytes_per_token: int, memory_bytes: float, least_tokens: int, name: str) -> int:
    """Tokens of keys and values that fit into a device with a stage's weights; 10 % are left for a pass.

    Raises DoesNotFit if they are fewer than `least_tokens`.
    """
    tokens = int((memory_bytes * _USABLE - weight_bytes) // kv_bytes_per_token)
    if tokens < least_tokens:
        raise DoesNotFit(
            f"{name}: {weight_bytes / 1e9:.1f} GB of weights and {least_tokens} tokens of {kv_bytes_per_token} bytes in "
            f"{memory_bytes / 1e9:g} GB, of which {_USABLE:.0%} are used: cut the model into more stages"
        )
    return tokens


_USABLE: Final = 0.9
