"""A member's part of a gateway while its tokenizer is being loaded."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import pytest

from eventing.problems import NotReady
from functions.configuration.config import GatewayConfig, read_config
from functions.gateway import function
from functions.gateway.fleet import parts
from functions.gateway.fleet.members import Version
from functions.gateway.fleet.parts import Part, Parts
from functions.hosting.publication import WrongPublication, read_publication
from tests.support.functions.functions import gateway_environment, wait_until
from tests.support.storage.published import CUT, Published


@contextmanager
def a_part(published: Published, monkeypatch: pytest.MonkeyPatch, read: Callable[..., Any]) -> Iterator[tuple[Parts, Version]]:
    """read: reads the model's publication, in place of the function that does."""
    monkeypatch.setattr(function, "read_publication", read)
    environ = gateway_environment(published, ["http://127.0.0.1:9"] * len(CUT))
    version = Version("tiny", "tiny", None, environ, cast("GatewayConfig", read_config(environ)))
    found = Parts(None, 2**40, lambda *_: nullcontext())
    found.thread.start()
    yield found, version
    found.close()


def load(found: Parts, version: Version) -> Part:
    with found.use(version) as part:
        part.load(wakes=False)
        return part


def test_a_part_that_is_loaded_slowly_answers_in_the_end(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for failed, given up and loaded again, as slowly."""
    monkeypatch.setattr(parts, "_LOAD_SECONDS", 0.01)
    monkeypatch.setattr(parts, "_RETRY_SECONDS", 0.0)
    released, reads = threading.Event(), list[object]()

    def read(*arguments: Any) -> Any:
        reads.append(arguments)
        released.wait(60)
        return read_publication(*arguments)

    with a_part(published, monkeypatch, read) as (found, version):
        for _ in range(2):
            with pytest.raises(NotReady, match="member tiny is still being loaded"):
                load(found, version)
        released.set()
        (part,) = found.loaded()
        wait_until(lambda: part.state == "loaded")
        assert load(found, version) is part
        assert len(reads) == 1


def test_a_part_that_failed_is_loaded_again(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_RETRY_SECONDS", 0.0)
    faults = [WrongPublication("it is another model's")]

    def read(*arguments: Any) -> Any:
        if faults:
            raise faults.pop()
        return read_publication(*arguments)

    with a_part(published, monkeypatch, read) as (found, version):
        with pytest.raises(NotReady, match="member tiny cannot be loaded"):
            load(found, version)
        (part,) = found.loaded()
        assert part.state == "failed"
        assert load(found, version) is not part
