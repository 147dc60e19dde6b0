"""What the gateway says of its own health."""

import threading

import pytest
from werkzeug.test import Client

from functions.configuration.config import GatewayConfig, read_config
from functions.gateway.function import GatewayFunction
from functions.hosting.startup import StartUp
from tests.support.environments import GATEWAY


def test_it_is_sick_where_its_scheduler_is(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(GATEWAY)
    assert isinstance(config, GatewayConfig)
    function = GatewayFunction(config, StartUp())
    platform = Client(function.service.management)
    try:
        assert platform.get("/healthz").status_code == 200
        with monkeypatch.context() as patched:
            patched.setattr(function._running.scheduler, "_clock", threading.Thread(target=lambda: None))
            assert platform.get("/healthz").status_code == 503
    finally:
        function.close()
