"""A store for each module of tests, and a proxy before it that counts requests and injects faults."""

from collections.abc import Iterator

import pytest

from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings
from tests.support.storage.storage import FaultProxy, fault_proxy


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreSettings]:
    with EmbeddedStore(tmp_path_factory.mktemp("store")) as store:
        yield store.settings


@pytest.fixture(scope="module")
def store(settings: StoreSettings) -> ObjectStore:
    return ObjectStore(settings)


@pytest.fixture
def proxy(settings: StoreSettings) -> Iterator[FaultProxy]:
    with fault_proxy(settings) as proxy:
        yield proxy
