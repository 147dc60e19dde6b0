"""Which gateways still live, as a stage hears it: every event says so, and a release without rows says nothing else."""

from collections.abc import Collection

from eventing.wire.control import LEASE_SECONDS


class Leases:
    """By the source of events, which names one boot of a gateway.

    Counted in looks rather than by a clock: what a long pass takes, or a pause of this whole process, is no gateway's silence,
    since nobody listened. Any thread may call `heard`, the engine's alone `look`.
    """

    LOOKS = 10
    """Whoever was not heard of between so many looks is gone."""

    def __init__(self, lease_seconds: float = LEASE_SECONDS) -> None:
        self.look_seconds = lease_seconds / self.LOOKS
        """At least so long lies between two looks."""
        self._looks = 0
        self._heard: dict[str, int] = {}

    def heard(self, source: str) -> None:
        self._heard[source] = self._looks

    def look(self, holders: Collection[str]) -> set[str]:
        """Those of `holders`, the sources that hold something here, that are gone."""
        self._looks += 1
        silent = {source for source, heard in list(self._heard.items()) if self._looks - heard > self.LOOKS}
        for source in silent:
            self._heard.pop(source, None)
        for source in holders:  # One that was heard of again just before it was taken for silent.
            self._heard.setdefault(source, self._looks)
        return silent.intersection(holders)
