"""What `vector_code` and `scalar_code` write LLVM's code with: types, and instructions on memory at an address."""

from typing import Any, Final

from llvmlite import ir
from numba.core import cgutils

from functions.stage.native.shapes import LANES

I8, I16, I32, I64, F32 = (ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType())
FLOATS: Final = ir.VectorType(F32, LANES)
INTS: Final = ir.VectorType(I32, LANES)


class BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


def number(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def load(builder: Any, address: Any, offset: Any, kind: ir.Type) -> Any:
    return builder.load(builder.inttoptr(builder.add(address, offset), kind.as_pointer()), align=1)


def call(builder: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def broadcast(builder: Any, value: Any, vector: ir.Type) -> Any:
    """The same number in every lane."""
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(INTS, [0] * LANES))
