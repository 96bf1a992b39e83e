"""Between ASGI and the API: bodies with a bound, event streams, clients that leave."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from dsv3_jax.serve.server.errors import ApiError

JSON_TYPE = "application/json"
BODY_SECONDS = 30.0
"""For a body to arrive, so that slow ones do not pile up."""


async def read_body(request: Request, most_bytes: int) -> bytes:
    """The body. Raises ApiError: 413 for one over `most_bytes`, 415 for one that is no JSON,
    408 for one that does not end.

    A browser sends JSON to another origin only if that allows it, so that a page somewhere cannot
    ask a server on its visitor's machine.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON_TYPE:
        raise ApiError(415, f"Content-Type is {kind!r}, expected {JSON_TYPE}.")
    too_large = ApiError(413, f"The body is too large, expected at most {most_bytes} bytes.")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most_bytes:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > most_bytes:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"The body took longer than {BODY_SECONDS:g} s.") from error
    except ClientDisconnect as error:
        raise ApiError(400, "The body ended early.") from error
    return bytes(content)


class WatchClient:
    """Calls `on_leave` if the client hangs up inside the `async with`."""

    def __init__(self, receive: Receive, on_leave: Callable[[], None]):
        self._receive = receive
        self._on_leave = on_leave

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._watch())

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._on_leave()


class EventStream(Response):
    """Server-sent events; `on_leave` is called if the client hangs up."""

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        on_leave: Callable[[], None],
        headers: dict[str, str],
    ):
        no_buffers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers={**headers, **no_buffers})
        del self.headers["content-length"]
        self._chunks = chunks
        self._on_leave = on_leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the chunks as they come. The first is empty: by it, what makes them has begun."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with (
            contextlib.aclosing(self._chunks) as chunks,
            WatchClient(receive, self._on_leave),
        ):
            await anext(chunks)
            await send(start)
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
