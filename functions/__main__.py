"""`python -m functions`: the entry point of stages and gateways. The environment says which of them runs."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from functions.configuration.config import Config, FleetConfig, StageConfig, read_config
from functions.configuration.environment_page import help_text, markdown_page
from functions.configuration.settings import ConfigError
from functions.hosting.startup import StartUp, without_collection

if TYPE_CHECKING:
    from functions.gateway.fleet.function import FleetFunction
    from functions.gateway.function import GatewayFunction
    from functions.stage.serving.function import StageFunction

    # `start` returns at once; after a later failure it calls what it got with an exit status. `drain` is called at SIGTERM: it
    # lets requests in hand finish, and refuses those that wait for readiness. `close` stops the function's own work, such as
    # its scheduler or engine: once, after the last request was answered; or before, if that takes too long, and then it fails
    # the requests that are still in hand.
    Function = StageFunction | GatewayFunction | FleetFunction

_log = logging.getLogger("functions")

USAGE_STATUS: Final = 2


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs the configured function until a signal ends it.

    Returns the status to exit with: 0, 1 (failed) or 2 (wrong environment).
    """
    start_up = StartUp()
    if arguments:
        return _explain(arguments)
    try:
        config = read_config(environ)
    except ConfigError as error:
        return _report(error)
    return _serve(config, start_up, environ)


def _report(error: ConfigError) -> int:
    for sentence in error.errors:
        print(f"error: {sentence}", file=sys.stderr)
    return USAGE_STATUS


def _explain(arguments: Sequence[str]) -> int:
    pages = {"--help": help_text, "-h": help_text, "--environment": markdown_page}
    if len(arguments) != 1 or arguments[0] not in pages:
        print(f"error: {' '.join(arguments)}: functions are configured by the environment, which --help lists", file=sys.stderr)
        return USAGE_STATUS
    print(pages[arguments[0]](), end="")
    return 0


def _serve(config: Config, start_up: StartUp, environ: Mapping[str, str]) -> int:
    # Imported late: a wrong environment and --help need none of it, and each role only its own modules.
    with without_collection():
        from functions.hosting.startup import return_free_memory, use_few_arenas

        use_few_arenas()
        return_free_memory()
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        logging.basicConfig(level=config.log_level.upper(), stream=sys.stderr, format=form, force=True)
        try:
            function = _function(config, start_up, environ)
        except ConfigError as error:
            return _report(error)
        from functions.hosting.connection import ServerLimits
        from functions.hosting.server import Server
    try:
        limits = ServerLimits() if isinstance(config, StageConfig) else ServerLimits(graceful_seconds=config.drain_seconds)
        server = Server(config.listen, config.port, config.metrics_port, limits)
    except OSError as error:
        _log.error("cannot listen on %s; choose another with PORT or LAMINA_METRICS_PORT", error.strerror)
        return 1
    function.start(server.stop)
    _log.info("listening on port %d", server.port)
    _log.info("metrics on port %d", server.management_port)
    return server.run(function.service, function.drain, function.close)


def _function(config: Config, start_up: StartUp, environ: Mapping[str, str]) -> "Function":
    """Builds the function that the configuration describes. Raises ConfigError.

    Some work takes long, so it begins before the function's remaining modules are imported. A stage loads its weights. A
    gateway wakes its stages, because a request that starts a gateway from zero needs all of them.
    """
    if isinstance(config, StageConfig):
        from functions.stage.serving.arriving import ArrivingModel

        arriving = ArrivingModel(config, start_up)
        from functions.stage.serving.function import StageFunction

        return StageFunction(config, start_up, arriving)
    if isinstance(config, FleetConfig):
        from functions.gateway.fleet.function import FleetFunction

        return FleetFunction(config, environ, start_up)
    from functions.gateway.build import start_scheduler

    running = start_scheduler(config)
    running.scheduler.wake()
    from functions.gateway.function import GatewayFunction

    return GatewayFunction(config, start_up, running)


if __name__ == "__main__":
    status = main(sys.argv[1:], os.environ)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit, which would wait for threads that still import torch or wait for the store.
    os._exit(status)
