"""The members of a fleet, as their ConfigMaps describe them: one ConfigMap for each member, and a second during a canary."""

import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final

from functions.configuration.api_keys import ApiKey, sha256_of
from functions.configuration.config import FLEET_LABEL, PERCENT, FleetConfig, GatewayConfig, member_config
from functions.configuration.settings import ConfigError
from functions.gateway.answers.authentication import Clients, KeyRing
from functions.gateway.stages.endpoints import service_name
from functions.gateway.stages.kubernetes_api import CONFIG_MAPS, KubernetesAPI, KubernetesItem, ObjectWatch

_log = logging.getLogger(__name__)

_MOST_OPENED: Final = 10_000  # keys that are remembered with their member
_MEMBER_LABEL: Final = "app.kubernetes.io/instance"
_CONTENT: Final = attrgetter("member", "percent", "environ")  # of a Version: what its ConfigMap says


class ConfigMap(KubernetesItem):
    data: dict[str, str] | None = None


@dataclass(frozen=True, eq=False)
class Version:
    """One version of a member: a pipeline with its stages. It is equal only to itself; a changed ConfigMap makes a new one."""

    name: str  # of its ConfigMap
    member: str
    percent: int | None  # share of the member's requests; None: those that no canary takes
    environ: Mapping[str, str] = field(repr=False)
    config: GatewayConfig | None  # None: the ConfigMap is wrong, as `trouble` says
    trouble: str = ""

    @property
    def services(self) -> Sequence[str]:
        """The names of the Knative Services of the version's stages."""
        return () if self.config is None else self.config.stage_services or [service_name(url) for _, url in self.config.stages]

    @property
    def devices_key(self) -> str:
        """Identifies the pods of the version's stages. Versions with the same stages have the same key."""
        return ",".join(self.services)

    @property
    def serves_batches(self) -> bool:
        return self.config is not None and self.config.jobs_store is not None

    @property
    def model(self) -> str:
        return self.environ.get("LAMINA_MODEL", "")


class Members:
    """The present members of the fleet. Thread-safe."""

    def __init__(
        self, config: FleetConfig, environ: Mapping[str, str], on_gone: Callable[[Sequence[Version]], None] = lambda _: None
    ) -> None:
        """`environ` is the environment of the process.

        `on_gone` is called with versions that were removed or replaced, in the thread of the watch.
        """
        assert config.kubernetes_api is not None
        self.listed = threading.Event()  # the members are known
        self.clients = Clients(  # keys of all members open the fleet
            None if config.keys_folder is None else self.key, config.proxies, "an API key of one of the fleet's members"
        )
        self._config = config
        self._environ = environ
        self._on_gone = on_gone
        self._lock = threading.Lock()
        self._versions: dict[str, Version] = {}  # by name of their ConfigMap
        self.by_model: dict[str, list[Version]] = {}  # all versions by the name of their model; replaced as a whole
        self._names: frozenset[str] = frozenset()  # of members
        self._rings: dict[str, KeyRing] = {}  # by member
        self._opened: dict[str, str] = {}  # hash of an API key → the member that it opened last; at most _MOST_OPENED
        api = KubernetesAPI(config.kubernetes_api, config.namespace, CONFIG_MAPS)
        what = f"the members of the fleet {config.fleet}"
        self.watch = ObjectWatch(api, f"{FLEET_LABEL}={config.fleet}", ConfigMap, what, self.changed)

    def changed(self, found: Mapping[str, ConfigMap], changed: ConfigMap | None) -> None:
        """Applies the ConfigMaps in `found`. `changed` is the only one that differs; if it is None, any may differ."""
        names = {*self._versions, *found} if changed is None else {changed.metadata.name}
        gone = []
        versions = dict(self._versions)
        for name in names:
            before, now = versions.pop(name, None), found.get(name)
            version = None if now is None else self._version(now)
            if before is not None and version is not None and _CONTENT(before) == _CONTENT(version):
                version = before
            elif before is not None:
                gone.append(before)
            if version is not None:
                versions[name] = version
                if version is not before and version.trouble:
                    _log.error("member %s cannot be served: %s", version.member, version.trouble)
        by_model: dict[str, list[Version]] = {}
        for name in sorted(versions):
            by_model.setdefault(versions[name].model, []).append(versions[name])
        for model, group in by_model.items():
            if len(stable := [each.member for each in group if each.percent is None]) > 1:
                _log.error("model %s is of members %s: %s serves it", model, " and ".join(stable), stable[0])
        with self._lock:
            self._versions, self.by_model = versions, by_model
            self._names = frozenset(each.member for each in versions.values())
            self._rings = {member: ring for member, ring in self._rings.items() if member in self._names}
        self.listed.set()
        if gone:
            self._on_gone(gone)

    def versions(self) -> list[Version]:
        """Returns all versions of all members, grouped by model."""
        return [version for group in self.by_model.values() for version in group]

    def find(self, named: str, secret: str) -> Version | None:
        """Returns the version that answers a request for a model. During a canary, draws it by the percentages.

        `named` is `MODEL` or `MODEL:ADAPTER`. Returns None if no member that this API key opens serves the model.
        """
        by_model = self.by_model
        group = by_model.get(named) or by_model.get(named.partition(":")[0])
        if not group or not self._opens(group, secret):
            return None
        drawn = random.uniform(0, 100)
        for canary in (each for each in group if each.percent is not None):
            drawn -= canary.percent or 0
            if drawn < 0:
                return canary
        return next((each for each in group if each.percent is None), group[0])

    def key(self, secret: str) -> ApiKey | None:
        """Returns the API key with this text, of whichever member has it; None if none has it."""
        hashed = sha256_of(secret)
        with self._lock:
            members = self._names
        last = self._opened.pop(hashed, "")  # the poller's thread asks for each request: hundreds of members take a millisecond
        for member in (last, *members) if last in members else members:
            if (key := self._ring(member).find(secret)) is not None:
                if len(self._opened) >= _MOST_OPENED:
                    self._opened.clear()
                self._opened[hashed] = member
                return key
        return None

    def opened_by(self, secret: str) -> list[str]:
        """Returns the models that a client with this API key may use: all of them if no keys are needed."""
        return [model for model, group in self.by_model.items() if self._opens(group, secret)]

    def with_batches(self, secret: str = "") -> list[Version]:
        """Returns the versions that serve files and batches and that this API key opens, without canaries."""
        found = (each for model in self.opened_by(secret) for each in self.by_model.get(model, ()))
        return [each for each in found if each.percent is None and each.serves_batches]

    def _opens(self, group: Sequence[Version], secret: str) -> bool:
        """Returns whether this API key opens the member whose versions are `group`."""
        return not self.clients.are_known or self._ring(group[0].member).find(secret) is not None

    def _ring(self, member: str) -> KeyRing:
        """Returns the API keys of a member. While the file with its keys is missing, the member accepts no client."""
        ring = self._rings.get(member)
        if ring is None:
            try:
                ring = KeyRing((), (f"{self._config.keys_folder}/{member}",))
            except ConfigError:
                return KeyRing(())
            self._rings[member] = ring
        return ring

    def _version(self, found: ConfigMap) -> Version:
        metadata, environ = found.metadata, dict(found.data or {})
        member = (metadata.labels or {}).get(_MEMBER_LABEL, metadata.name)
        if self._config.keys_folder is not None:
            environ["LAMINA_API_KEY_FILES"] = f"{self._config.keys_folder}/{member}"
        said = (metadata.annotations or {}).get(PERCENT)
        percent = int(said) if said is not None and said.isdecimal() else None
        try:
            return Version(metadata.name, member, percent, environ, member_config(self._environ, environ))
        except ConfigError as error:
            return Version(metadata.name, member, percent, environ, None, str(error))
