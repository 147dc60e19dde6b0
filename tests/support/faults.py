"""What is wrong with JSON that a struct of the wire refuses, in words that are ours and not msgspec's."""

import msgspec
import pytest

from eventing.wire.faults import find_fault


def fault_of(text: str, type_: type[msgspec.Struct]) -> str:
    """`path: what is allowed there`. The decoder must refuse the text, too."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=type_)
    fault = find_fault(msgspec.json.decode(text), type_)
    assert fault is not None
    return f"{fault.path}: {fault.expected}"
