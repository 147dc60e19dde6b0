"""How the C library gives out memory: from few places, so that what one thread gave back another can use."""

import ctypes
from typing import Final

_M_ARENA_MAX: Final = -8  # mallopt(3)
_ARENAS: Final = 2


def use_few_arenas() -> None:
    """To be called before there are threads. Where the C library is not glibc, nothing happens.

    glibc makes up to eight arenas for each core and spreads threads over them, and memory that was freed in one of them serves
    nobody else. A gateway's hundreds of threads, each of which reads a large body now and then, made 16 such hoards that
    grew for as long as it ran: of 228 MiB, 46 were in use (docs/log.md). Most work holds the interpreter's lock anyway.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)
