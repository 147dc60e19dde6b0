"""What the platform and its fork server say to each other: JSON lines over a socket pair."""

import msgspec


class Fork(msgspec.Struct, frozen=True):
    """Platform → server: make a pod's process."""

    number: int
    """Of the request; its answer has the same."""
    environ: dict[str, str]
    """All of it: nothing of the server's own environment is left."""
    log: str
    """File that stdout and stderr are appended to."""


class Imported(msgspec.Struct, frozen=True, tag="imported"):
    """Server → platform: from now on forks are quick."""

    seconds: float


class Forked(msgspec.Struct, frozen=True, tag="forked"):
    """Server → platform: the process runs, alone in its session and process group."""

    number: int
    pid: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Server → platform: there is no process."""

    number: int
    errno: int
    reason: str


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """Server → platform: a process is gone, and reaped."""

    pid: int
    status: int
    """Exit status; negative: the signal that ended it."""


Answer = Imported | Forked | Refused | Ended


def line(message: Fork | Answer) -> bytes:
    return msgspec.json.encode(message) + b"\n"
