"""What numba cannot say about single numbers: their bits, memory and functions at an address, counters that threads share."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from functions.stage.native import target
from functions.stage.native.emit import F32, I8, I32, I64, call


@intrinsic
def pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """The address as a pointer, for `carray`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], I8.as_pointer())

    return types.voidptr(types.int64), codegen


@intrinsic
def call_at(typing_context, address):  # type: ignore[no-untyped-def]
    """Calls the C function `int (void)` at the address. One that returns nothing may be called so, too."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = builder.inttoptr(arguments[0], ir.FunctionType(I32, []).as_pointer())
        return builder.call(function, [])

    return types.int32(types.int64), codegen


@intrinsic
def fetch_add(typing_context, address, value):  # type: ignore[no-untyped-def]
    """Adds to the int64 at the address, which other threads add to as well; returns what it was."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        counter = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", counter, arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def load_acquired(typing_context, address):  # type: ignore[no-untyped-def]
    """The int64 at the address; what another thread wrote ahead of its `fetch_add` is to be seen from here on."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def pause(typing_context):  # type: ignore[no-untyped-def]
    """Tells the CPU that this is a loop of waiting, where it has an instruction for that."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if target.is_x86():
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def nearest(typing_context, value):  # type: ignore[no-untyped-def]
    """The nearest whole number, as a float; ties to even. numba's `rint` is a call, of which no vector can be made."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, "llvm.nearbyint.f32", F32, arguments[0])

    return types.float32(types.float32), codegen


@intrinsic
def float_of_bits(typing_context, bits):  # type: ignore[no-untyped-def]
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.int32), codegen


@intrinsic
def bits_of_float(typing_context, value):  # type: ignore[no-untyped-def]
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], I32)

    return types.int32(types.float32), codegen
