"""How the threads of a pass share its work: each phase is cut into pieces, and whoever is free takes the next.

A thread takes the pieces of its own share first, so that it finds in its cache what it has read before, and then those that
others have not come to. A thread that its core was taken from holds up nobody but for the piece in its hands; at a barrier,
all would wait for it. What a piece computes depends on nothing but the piece, so that it does not matter who takes it.

Counters: for every phase of the pass one per thread, of the pieces taken of its share, and one of the pieces done by all.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from functions.stage.native.arithmetic import jit
from functions.stage.native.scalar_code import call_at, fetch_add, load_acquired, pause
from functions.stage.native.shapes import LINE_BYTES

_TURNS_AWAKE: Final = 256
"""Of waiting for the others, before the core is offered to whoever wants it: some microseconds."""


class Worker(NamedTuple):
    """One of the threads. The rest are addresses."""

    number: int
    threads: int
    scratch: int
    counters: int
    give_way: int


@jit
def take(worker: Any, phase: int, things: int, parts: int) -> int:
    """The number of the next piece, `thing * parts + part`, or -1. Shares are of whole things, as far as nobody is behind."""
    for other in range(worker.threads):
        owner = (worker.number + other) % worker.threads
        begin, end = _first_of(owner, worker.threads, things) * parts, _first_of(owner + 1, worker.threads, things) * parts
        taken_at = _counter(worker, phase, owner)
        if load_acquired(taken_at) < end - begin:
            piece = begin + fetch_add(taken_at, 1)
            if piece < end:
                return piece
    return -1


@jit
def finish(worker: Any, phase: int, done: int, pieces: int) -> None:
    """This thread has done so many pieces and found no more; returns when all are done, and their results are to be seen."""
    done_at = _counter(worker, phase, worker.threads)
    fetch_add(done_at, done)
    turns = 0
    while load_acquired(done_at) < pieces:
        turns += 1
        if turns < _TURNS_AWAKE:
            pause()
        else:
            call_at(worker.give_way)


@jit
def _first_of(share: int, shares: int, things: int) -> int:
    return things * share // shares


@jit
def _counter(worker: Any, phase: int, which: int) -> int:
    return worker.counters + LINE_BYTES * (phase * (worker.threads + 1) + which)


def phase_of(do: Callable[..., None]) -> Any:
    """A whole phase, of as many pieces as all things have parts: calls `do(thing, part, *arguments)` for each of them."""

    @jit
    def run(worker: Any, phase: int, things: int, parts: int, *arguments: Any) -> None:
        done = 0
        piece = take(worker, phase, things, parts)
        while piece >= 0:
            do(piece // parts, piece % parts, *arguments)
            done += 1
            piece = take(worker, phase, things, parts)
        finish(worker, phase, done, things * parts)

    return run
