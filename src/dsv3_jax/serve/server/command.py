"""`dsv3 serve`: loads a checkpoint, answers until it is told to end, then drains."""

import argparse
import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from dsv3_jax.config import ServerConfig
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.serve.request import Backend
from dsv3_jax.serve.server.api import Api
from dsv3_jax.serve.server.app import make_app
from dsv3_jax.serve.server.logs import log, log_to_standard_error
from dsv3_jax.serve.server.templates import load_template

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAST_WORDS_SECONDS = 5
"""For clients to read their answers' ends, once nothing is in the engine."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint ready to be served. `backend` is not started."""

    backend: Backend
    tokenizer: Tokenizer
    directory: Path
    """Where its chat_template.jinja or tokenizer_config.json would be."""
    name: str
    vocab_size: int
    stop_tokens: tuple[int, ...]


def run(
    options: argparse.Namespace, config: ServerConfig, load: Callable[[Path, ServerConfig], Loaded]
) -> int:
    """Serves until SIGTERM or SIGINT; 0, or 1 where the engine could not start.

    Raises ValueError for options that cannot be. What is wrong is said before the model is loaded.
    """
    with _bound_socket(options.host, options.port) as listener:
        loaded = load(Path(options.checkpoint), config)
        template = load_template(loaded.directory, loaded.tokenizer)
        name = options.name or loaded.name
        app = make_app(
            loaded.backend,
            loaded.tokenizer,
            config.serve,
            name=name,
            vocab_size=loaded.vocab_size,
            template=template,
            stop_tokens=loaded.stop_tokens,
        )
        log_to_standard_error()
        if template.is_fallback:
            log("chat_template", kind="fallback: User: ... Assistant:")
        if config.serve.api_keys_file is None and not _is_loopback(listener):
            log("open_to_anyone", host=options.host, advice="set serve.api_keys_file")
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_WORDS_SECONDS,
        )
        server = Server(settings, app.state.api, config.serve.drain_seconds, _url(listener))
        server.run(sockets=[listener])
    return server.exit_code


class Server(uvicorn.Server):
    """uvicorn that drains at the first signal, and ends at once at the second."""

    def __init__(self, config: uvicorn.Config, api: Api, drain_seconds: float, url: str):
        super().__init__(config)
        self.exit_code = 0
        self._api = api
        self._drain_seconds = drain_seconds
        self._url = url
        self._tasks: list[asyncio.Task[None]] = []

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Around the serving, in its event loop."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        self._tasks.append(loop.create_task(self._announce()))
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
            for task in self._tasks:
                task.cancel()

    def _on_signal(self, number: int) -> None:
        if self._api.admission.drains_until is not None:
            log("ended", signal=signal.Signals(number).name)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._api.drain(self._drain_seconds)
        self._tasks.append(asyncio.get_running_loop().create_task(self._drain()))

    async def _drain(self) -> None:
        log("draining", running=self._api.admission.in_flight, seconds=self._drain_seconds)
        was_time = await self._api.bridge.drain(self._drain_seconds)
        log("drained", all_finished=was_time)
        self.should_exit = True

    async def _announce(self) -> None:
        bridge, name = self._api.bridge, self._api.served.name
        while not bridge.is_ready:
            if bridge.start_error is not None:
                self.exit_code, self.should_exit = 1, True
                return
            await asyncio.sleep(0.05)
        print(f"dsv3 serve: {name} at {self._url} (chat there, API under /v1)", flush=True)
        log("ready", url=self._url, model=name)


def _bound_socket(host: str, port: int) -> socket.socket:
    """A socket at the address, on which nobody listens yet. Raises ValueError if it is not free."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port is {port}, expected a number from 0 to 65535")
    try:
        kind = socket.SOCK_STREAM
        family, *_, address = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ValueError(f"--host is {host!r}, expected an address: {error.strerror}") from error
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        what = f"--host {host} --port {port}"
        raise ValueError(f"{what}: {error.strerror}, expected a free address") from error
    return listener


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
