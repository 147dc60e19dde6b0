"""Makes a forked process what a freshly started one is, but for the modules it has imported already."""

import ctypes
import os
import random
import signal
import sys
from collections.abc import Mapping
from typing import Final

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


class ParentGone(Exception):
    """The parent died before this process could be tied to it."""


def isolate(environ: Mapping[str, str], output: int, parent: int) -> None:
    """Session, signals, files, environment and random numbers of its own. `output`: a file descriptor for 1 and 2.

    The caller has closed its own sockets and files: what is open besides 0, 1 and 2 is closed behind their objects' backs.
    Raises OSError, ParentGone.
    """
    os.setsid()
    _die_with(parent)
    _reset_signals()
    _keep_only(output)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = ["functions"]
    _reseed()


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise ParentGone(f"process {parent} has ended")


def _reset_signals() -> None:
    """As Python sets them at its start."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) is not None:  # None: handled by a C library, such as a sanitizer
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _keep_only(output: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in ((0, null), (1, output), (2, output)):
        os.dup2(source, descriptor)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))


def _reseed() -> None:
    """Where the module is there: two pods must not draw the same numbers. `secrets` and `uuid` ask the kernel each time."""
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.seed()
