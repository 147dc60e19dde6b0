"""A server that lists and watches objects as the Kubernetes API does: versions, JSON lines, bookmarks, 410."""

import json
import re
from queue import SimpleQueue
from threading import Lock, Thread
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from tests.support.http_server import Exchange, Server


class WatchServer:
    """Serves ConfigMaps at their paths, and all other objects at every other path. Each change has a new version."""

    def __init__(self, port: int = 0) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.version = 0
        self.requests: list[str] = []
        self.watches: list[SimpleQueue[bytes | None]] = []
        self._history: list[tuple[int, bytes]] = []
        self._lock = Lock()
        self.failures: list[int] = []  # statuses of the next replies; 200: a reply that is not JSON
        self._gone = ""
        self.always_gone = False  # answer every watch with 410
        self._server = Server(self._answer, port)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def url(self) -> str:
        return self._server.origin

    def put(self, obj: dict[str, Any], *, silently: bool = False) -> None:
        """Creates or replaces an object. silently: without an event for watches."""
        kind = "MODIFIED" if obj["metadata"]["name"] in self.objects else "ADDED"
        self._version(obj)
        self.objects[obj["metadata"]["name"]] = obj
        if not silently:
            self._tell(kind, obj)

    def delete(self, name: str) -> None:
        obj = self.objects.pop(name)
        self._version(obj)
        self._tell("DELETED", obj)

    def bookmark(self, version: str) -> None:
        self._tell("BOOKMARK", {"kind": "EndpointSlice", "metadata": {"resourceVersion": version}})

    def expire(self, how: str) -> None:
        """Answers the next watch with 410: how is "status" (of the reply) or "event"."""
        self._gone = how

    def end_watches(self, *, broken: bool = False) -> None:
        """broken: in the middle of a line, like a lost connection."""
        watches, self.watches = self.watches, []
        for watch in watches:
            watch.put(b"" if broken else None)

    def _version(self, obj: dict[str, Any]) -> None:
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)

    def _tell(self, kind: str, obj: dict[str, Any]) -> None:
        line = json.dumps({"type": kind, "object": obj}).encode() + b"\n"
        with self._lock:
            self._history.append((self.version, line))
            for watch in self.watches:
                watch.put(line)

    def _answer(self, request: Exchange) -> None:
        self.requests.append(request.path)
        query = parse_qs(urlsplit(request.path).query)
        if self.failures:
            request.answer(self.failures.pop(0), b"{")
        elif "watch" not in query:
            items = [obj for obj in self.objects.values() if _selected(obj, request.path)]
            metadata = {"resourceVersion": str(self.version)}
            request.answer(200, json.dumps({"metadata": metadata, "items": items}).encode())
        elif self.always_gone or self._gone == "status":
            self._gone = ""
            request.answer(410, b"{}")
        else:
            self._stream(request, query)

    def _stream(self, request: Exchange, query: dict[str, list[str]]) -> None:
        since = int(query["resourceVersion"][0])
        watch: SimpleQueue[bytes | None] = SimpleQueue()
        if self._gone == "event":
            self._gone = ""
            watch.put(json.dumps({"type": "ERROR", "object": {"kind": "Status", "code": 410}}).encode() + b"\n")
        with self._lock:
            for version, line in self._history:
                if version > since:
                    watch.put(line)
            self.watches.append(watch)
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        try:
            while line := watch.get():
                if _selected(json.loads(line)["object"], request.path):
                    request.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            request.wfile.write(b"ff\r\n{" if line == b"" else b"0\r\n\r\n")
            request.close_connection = line == b""
        except OSError:
            request.close_connection = True

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.end_watches()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _selected(obj: dict[str, Any], target: str) -> bool:
    """Compares only labels that the object has; one without labels is in every collection of its kind."""
    parts = urlsplit(target)
    if obj.get("kind") != "Status" and (obj.get("kind") == "ConfigMap") != parts.path.endswith("/configmaps"):
        return False
    labels = obj.get("metadata", {}).get("labels", {})
    terms = re.findall(r"([^ ,=]+)(?:=| in \()([^)=]*?)(?:\)|$|,(?=[^,]*[=(]))", parse_qs(parts.query)["labelSelector"][0])
    return all(name not in labels or labels[name] in values.split(",") for name, values in terms)
