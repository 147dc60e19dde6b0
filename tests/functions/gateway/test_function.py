"""The gateway's health."""

import threading

import pytest
from werkzeug.test import Client

from functions.gateway.build import start_scheduler
from functions.gateway.function import GatewayFunction
from functions.hosting.startup import StartUp
from tests.support.environments import gateway_config


def test_a_gateway_with_a_dead_scheduler_thread_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    config = gateway_config()
    running = start_scheduler(config)
    function = GatewayFunction(config, StartUp(), running)
    platform = Client(function.service.management)
    try:
        assert platform.get("/healthz").status_code == 200
        with monkeypatch.context() as patched:
            patched.setattr(running.scheduler, "_clock", threading.Thread(target=lambda: None))
            assert platform.get("/healthz").status_code == 503
    finally:
        function.close()
