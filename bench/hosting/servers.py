"""The functions' own server and others, each in a process of its own: `python -m bench.hosting.servers NAME PORT`.

Each at its best for this: one process, THREADS threads, kept connections.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from bench.hosting.application import STREAM_PATH, application, pieces

THREADS: Final = 256
_KEEP_ALIVE_SECONDS: Final = 75
_MOST_BYTES: Final = 2**28


def own(port: int) -> None:
    from functions.hosting.server import Server, Service

    Server("127.0.0.1", port, 0).run(
        Service(application, application, lambda _: _MOST_BYTES, THREADS, _MOST_BYTES), on_stop=lambda: None
    )


def gunicorn(port: int) -> None:
    """Its threaded worker, as functions had it until it proved that slow clients hold its threads."""
    from gunicorn.app.base import BaseApplication

    class Application(BaseApplication):  # type: ignore[misc]
        def load_config(self) -> None:
            options = {
                "bind": f"127.0.0.1:{port}",
                "worker_class": "gthread",
                "threads": THREADS,
                "keepalive": _KEEP_ALIVE_SECONDS,
            }
            for name, value in options.items():
                self.cfg.set(name, value)

        def load(self) -> Any:
            return application

    Application().run()


def uvicorn(port: int) -> None:
    """A bare ASGI application over its C parser and loop; what a function does is done in a thread, as it has to be."""
    from uvicorn import run

    threads = ThreadPoolExecutor(THREADS)

    async def asgi(
        scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            return
        loop = asyncio.get_running_loop()
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["path"] == STREAM_PATH:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
            iterator = pieces()
            while (piece := await loop.run_in_executor(threads, _next, iterator)) is not None:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body"})
            return
        answer = await loop.run_in_executor(threads, bytes, body)
        headers = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    run(
        asgi,
        host="127.0.0.1",
        port=port,
        log_level="error",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )


def _next(iterator: Iterator[bytes]) -> bytes | None:
    return next(iterator, None)


def waitress(port: int) -> None:
    from waitress import serve

    serve(application, host="127.0.0.1", port=port, threads=THREADS, connection_limit=1000, send_bytes=1, _quiet=True)


SERVERS: Final = {"own": own, "gunicorn": gunicorn, "uvicorn": uvicorn, "waitress": waitress}


if __name__ == "__main__":
    SERVERS[sys.argv[1]](int(sys.argv[2]))
