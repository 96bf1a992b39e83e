"""What the endpoints do."""

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dsv3_jax.config import ServeConfig
from dsv3_jax.serve.server.admission import Admission
from dsv3_jax.serve.server.answers import Answer, Bridge
from dsv3_jax.serve.server.choices import Piece, TokenDetail
from dsv3_jax.serve.server.errors import ApiError, invalid
from dsv3_jax.serve.server.formats import DONE, ChatFormat, CompletionFormat, Format, event
from dsv3_jax.serve.server.http import EventStream, WatchClient, read_body
from dsv3_jax.serve.server.keys import Key, find_key
from dsv3_jax.serve.server.logs import log
from dsv3_jax.serve.server.metrics import Meters
from dsv3_jax.serve.server.plans import (
    Plan,
    ServedModel,
    check_model,
    encode_chat,
    plan_chat,
    plan_completion,
)
from dsv3_jax.serve.server.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
    parse,
)

LONG_BODY = 8192
"""Bytes from which on a body's texts become tokens in a thread, so that nobody's stream waits."""


class Api:
    """The endpoints over one model, one backend, one set of limits."""

    def __init__(
        self,
        served: ServedModel,
        bridge: Bridge,
        admission: Admission,
        serve: ServeConfig,
        keys: Sequence[Key],
    ):
        self.served = served
        self.bridge = bridge
        self.admission = admission
        self.meters = Meters(bridge, admission)
        self._serve = serve
        self._keys = keys

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._generate(request, CompletionBody, plan_completion, CompletionFormat)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._generate(request, ChatBody, plan_chat, ChatFormat)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        self._identify(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request, model: str) -> Response:
        """GET /v1/models/{model}."""
        self._identify(request)
        check_model(model, self.served)
        return JSONResponse(self._model())

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        body = await self._body(request, TokenizeBody)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("prompt: expected either prompt or messages", "prompt")
        tokenizer = self.served.tokenizer
        encode = tokenizer.encode_prompt if body.add_special_tokens else tokenizer.encode
        if body.messages is not None:
            tokens = list(await asyncio.to_thread(encode_chat, body, self.served))
        else:
            tokens = await asyncio.to_thread(encode, body.prompt)
        longest = self.served.max_seq_len
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": longest})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        body = await self._body(request, DetokenizeBody)
        size = self.served.vocab_size
        wrong = next((token for token in body.tokens if token >= size), None)
        if wrong is not None:
            raise invalid(f"tokens: {wrong} is no token, expected 0 to {size - 1}", "tokens")
        decode = self.served.tokenizer.decode
        text = await asyncio.to_thread(decode, body.tokens, skip_special_tokens=False)
        return JSONResponse({"prompt": text})

    async def health(self) -> Response:
        """GET /health: the process is up, and the engine has not failed."""
        failure = self.bridge.failure()
        if failure is not None:
            raise ApiError(503, f"The engine has failed: {failure}", code="engine_failed")
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """GET /ready: a request would be taken now."""
        self._check_serving()
        return JSONResponse({"status": "ready"})

    async def metrics(self) -> Response:
        """GET /metrics."""
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self.meters.exposition(), media_type=kind)

    async def stats(self) -> Response:
        """GET /stats."""
        return JSONResponse(self.meters.snapshot())

    def drain(self, seconds: float) -> None:
        """Takes no more requests, for a server that ends in `seconds` at the latest."""
        self.admission.drains_until = time.monotonic() + seconds

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Any error, in OpenAI's shape."""
        if isinstance(error, HTTPException):
            known = {404: "There is nothing here", 405: "This method is not allowed here"}
            message = known.get(error.status_code, str(error.detail))
            path = request.url.path
            found = ApiError(error.status_code, f"{message}: {request.method} {path}")
            headers = dict(error.headers or {})
        elif isinstance(error, ApiError):
            found, headers = error, error.headers()
        else:
            found, headers = ApiError(500, "The server made a mistake; its log says which."), {}
        self.meters.refused(found.status, found.reason)
        log(
            "refused",
            logging.ERROR if found.status == 500 else logging.INFO,
            path=request.url.path,
            status=found.status,
            code=found.code,
            param=found.param,
            reason=found.reason,
            error=repr(error) if found.status == 500 else None,
        )
        return JSONResponse(found.body(), found.status, headers)

    async def _generate(
        self,
        request: Request,
        kind: type[GenerationBody],
        make_plan: Callable[[Any, ServedModel], Plan],
        shape: type[Format],
    ) -> Response:
        key = self._identify(request)
        self._check_serving()
        content = await read_body(request, self._serve.max_body_bytes)
        body = parse(kind, content)
        check_model(body.model, self.served)
        if len(content) > LONG_BODY or getattr(body, "response_format", None) is not None:
            plan = await asyncio.to_thread(make_plan, body, self.served)
        else:
            plan = make_plan(body, self.served)
        name = key.name if key is not None else None
        now = time.monotonic()
        ticket = self.admission.admit(name, plan.prompt_tokens, plan.most_tokens, plan.choices, now)
        prefix = "chatcmpl" if shape is ChatFormat else "cmpl"
        answer = Answer(f"{prefix}-{uuid.uuid4().hex}", plan, self.served, ticket)
        format_ = shape(answer, self.served, int(time.time()))
        try:
            self.bridge.submit(answer)
        except ApiError:
            self.admission.settle(ticket, 0, now)
            raise
        headers = {"x-request-id": answer.name}
        if plan.stream:
            chunks = self._events(request.url.path, answer, format_)
            return EventStream(chunks, answer.leave, headers)
        async with WatchClient(request.receive, answer.leave):
            whole = await self._whole(request.url.path, answer, format_)
        return Response(whole, media_type="application/json", headers=headers)

    async def _whole(self, path: str, answer: Answer, format_: Format) -> bytes:
        texts: list[list[str]] = [[] for _ in answer.choices]
        details: list[list[TokenDetail]] = [[] for _ in answer.choices]
        async with self._answering(path, answer):
            async for index, piece in self._pieces(answer):
                texts[index].append(piece.text)
                details[index].extend(piece.details)
        return format_.whole(["".join(each) for each in texts], details, answer.usage)

    async def _events(
        self, path: str, answer: Answer, format_: Format
    ) -> AsyncGenerator[bytes, None]:
        try:
            async with self._answering(path, answer):
                yield b""
                if openings := format_.openings():
                    yield openings
                while not answer.is_complete and not answer.has_left:
                    pieces = await self._step(answer)
                    chunk = b"".join(format_.chunk(index, piece) for index, piece in pieces)
                    if chunk:
                        yield chunk
        except ApiError as error:
            self.meters.refused(error.status, error.reason)
            yield event(error.body())
            return
        if answer.plan.include_usage:
            yield format_.usage_chunk(answer.usage)
        yield DONE

    async def _pieces(self, answer: Answer) -> AsyncIterator[tuple[int, Piece]]:
        while not answer.is_complete and not answer.has_left:
            for each in await self._step(answer):
                yield each

    async def _step(self, answer: Answer) -> list[tuple[int, Piece]]:
        pieces = await answer.pieces()
        for index, piece in pieces:
            if piece.finish == "stop":  # by a stop text, perhaps: the engine has to be told
                self.bridge.cancel_choice(answer, index)
        return pieces

    @contextlib.asynccontextmanager
    async def _answering(self, path: str, answer: Answer) -> AsyncIterator[None]:
        """Around the making of an answer: its deadline before, cancelling and counting after."""
        seconds = self._serve.deadline_seconds
        late = ApiError(408, f"The answer took longer than {seconds:g} s.", code="deadline")
        timer = asyncio.get_running_loop().call_later(seconds, answer.fail, late)
        error: ApiError | None = None
        try:
            yield
        except ApiError as raised:
            error = raised
            raise
        finally:
            timer.cancel()
            self.bridge.cancel(answer)
            now = time.monotonic()
            usage, ticket = answer.usage, answer.ticket
            self.admission.settle(ticket, usage.completion_tokens, now)
            finish = "left" if not answer.is_complete else "complete"
            finish = finish if error is None else error.code or "error"
            self.meters.answered(path, answer, finish, now)
            first = ticket.first_token_at
            log(
                "answered",
                id=answer.name,
                path=path,
                key=ticket.key,
                finish=finish,
                reasons=[choice.finish for choice in answer.choices],
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                completion_tokens=usage.completion_tokens,
                ttft_seconds=None if first is None else round(first - ticket.admitted_at, 6),
                seconds=round(now - ticket.admitted_at, 6),
            )

    async def _body(self, request: Request, kind: type[Any]) -> Any:
        self._identify(request)
        body = parse(kind, await read_body(request, self._serve.max_body_bytes))
        check_model(body.model, self.served)
        return body

    def _check_serving(self) -> None:
        """Raises ApiError, a 503, where no request is taken."""
        self.admission.check_draining(time.monotonic())
        failure = self.bridge.failure()
        if failure is not None:
            message = f"The engine has failed: {failure}"
            wait = math.ceil(self._serve.drain_seconds) or 1
            raise ApiError(503, message, code="engine_failed", retry_after=wait, reason="failed")
        if not self.bridge.is_ready:
            message = "The engine is warming up."
            raise ApiError(503, message, code="warming_up", retry_after=1, reason="warming_up")

    def _identify(self, request: Request) -> Key | None:
        """The key that asks, None where none is needed. Raises ApiError, a 401."""
        if not self._keys:
            return None
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        key = find_key(self._keys, secret.strip()) if kind.lower() == "bearer" else None
        if key is None:
            message = "A valid API key is needed: Authorization: Bearer KEY."
            raise ApiError(401, message, code="invalid_api_key", reason="unauthorised")
        return key

    def _model(self) -> dict[str, Any]:
        served = self.served
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "dsv3_jax",
            "max_model_len": served.max_seq_len,
            "chat_template": "fallback" if served.template.is_fallback else "checkpoint",
        }
