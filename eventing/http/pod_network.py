"""Checks whether an address is a pod's, so that a forged EndpointSlice cannot divert prompts and the pipeline token."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class PodNetwork:
    """The networks and the port at which pods may be reached. `admits` checks an address against both."""

    networks: Sequence[Network]
    port: int  # 0: any
    secure: bool = False  # pods are reached by https only

    @property
    def scheme(self) -> str:
        return "https" if self.secure else "http"

    def admits(self, address: str, port: int) -> bool:
        try:
            seen = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(seen in network for network in self.networks) and self.port in (0, port)

    def __str__(self) -> str:
        return f"{','.join(map(str, self.networks))} port {self.port or 'any'}"
