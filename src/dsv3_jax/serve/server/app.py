"""The FastAPI application: routes, their published schema, errors, start and end."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dsv3_jax.config import ServeConfig
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.serve.request import Backend
from dsv3_jax.serve.server.admission import Admission, Limits
from dsv3_jax.serve.server.answers import Bridge
from dsv3_jax.serve.server.api import Api
from dsv3_jax.serve.server.errors import ApiError
from dsv3_jax.serve.server.keys import read_keys
from dsv3_jax.serve.server.plans import ServedModel
from dsv3_jax.serve.server.replies import (
    ChatReply,
    CompletionReply,
    DetokenizeReply,
    ErrorReply,
    ModelReply,
    ModelsReply,
    StatsReply,
    StatusReply,
    TokenizeReply,
)
from dsv3_jax.serve.server.schemas import (
    TOKEN_ID,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from dsv3_jax.serve.server.templates import FALLBACK, FALLBACK_STOP, ChatTemplate

POSTED = {400: "what the body asks for cannot be done", 401: "no valid API key"}
POSTED |= {404: "another model", 408: "past its deadline", 413: "too large a body", 415: "no JSON"}
GENERATED = POSTED | {429: "too busy, or over a budget: Retry-After"}
GENERATED |= {500: "the engine failed", 503: "warming up, shutting down, or failed"}

EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
"""A server-sent event; its data are JSON, of the last `[DONE]`."""


def make_app(
    backend: Backend,
    tokenizer: Tokenizer,
    serve: ServeConfig,
    *,
    name: str,
    vocab_size: int | None = None,
    template: ChatTemplate | None = None,
    stop_tokens: tuple[int, ...] | None = None,
) -> FastAPI:
    """An application that starts `backend` when it starts, and stops it when it ends.

    `vocab_size` is the model's (default: the tokenizer's), `stop_tokens` end every answer (default:
    the tokenizer's eos), `template` is the checkpoint's (default: a plain one).
    Raises ValueError for a damaged `serve.api_keys_file`.
    """
    eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    if template is None:
        template = ChatTemplate(FALLBACK, tokenizer, stop=FALLBACK_STOP, is_fallback=True)
    served = ServedModel(
        name=name,
        tokenizer=tokenizer,
        template=template,
        vocab_size=vocab_size or tokenizer.vocab_size,
        max_seq_len=backend.max_seq_len,
        stop_tokens=eos if stop_tokens is None else stop_tokens,
        created=int(time.time()),
    )
    keys = [] if serve.api_keys_file is None else read_keys(Path(serve.api_keys_file))
    limits = Limits(
        slots=backend.statistics().slots or serve.slots,
        max_queue=serve.max_queue,
        ttft_seconds=serve.slo_ttft_seconds,
        tpot_seconds=serve.slo_tpot_seconds,
    )
    admission = Admission(limits, keys, time.monotonic())
    bridge = Bridge(backend, admission)
    api = Api(served, bridge, admission, serve, keys)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(bridge.start())
        yield
        await asyncio.wait([starting])
        await asyncio.to_thread(backend.stop)

    app = FastAPI(
        title=f"{name} by dsv3_jax",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.api = api
    _add_routes(app, api)
    for kind in (ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, api.refuse)
    return app


def _add_routes(app: FastAPI, api: Api) -> None:
    def get(path: str, endpoint: Any, reply: type[BaseModel], *errors: int) -> None:
        responses = _responses(reply, {each: GENERATED[each] for each in errors})
        app.add_api_route(path, endpoint, methods=["GET"], responses=responses)

    def post(path: str, endpoint: Any, body: str, reply: type[BaseModel], errors: dict) -> None:
        responses = _responses(reply, errors)
        if reply in (CompletionReply, ChatReply):
            responses[200]["content"] = {"text/event-stream": {"schema": EVENT}}
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body}"}}}
        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            responses=responses,
            openapi_extra={"requestBody": {"required": True, "content": content}},
        )

    post("/v1/completions", api.completions, "CompletionBody", CompletionReply, GENERATED)
    post("/v1/chat/completions", api.chat, "ChatBody", ChatReply, GENERATED)
    post("/tokenize", api.tokenize, "TokenizeBody", TokenizeReply, POSTED)
    post("/detokenize", api.detokenize, "DetokenizeBody", DetokenizeReply, POSTED)
    get("/v1/models", api.models, ModelsReply, 401)
    get("/v1/models/{model:path}", api.model, ModelReply, 401, 404)
    get("/health", api.health, StatusReply, 503)
    get("/ready", api.ready, StatusReply, 503)
    get("/stats", api.stats, StatsReply)
    page = resources.files(__package__).joinpath("page.html").read_bytes()

    async def show_page() -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
        headers = {"content-security-policy": f"{policy} connect-src 'self'; img-src data:"}
        return Response(page, media_type="text/html", headers=headers)

    app.add_api_route("/metrics", api.metrics, methods=["GET"], include_in_schema=False)
    app.add_api_route("/", show_page, methods=["GET"], include_in_schema=False)
    app.openapi = lambda: _published(app, api.served.name)


def _responses(reply: type[BaseModel], errors: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    texts = {status: {"model": ErrorReply, "description": errors[status]} for status in errors}
    return {200: {"model": reply}, **texts}


def _titled(schema: Any, title: str) -> Iterator[dict[str, Any]]:
    """The parts of a schema that have a title."""
    if isinstance(schema, dict):
        if schema.get("title") == title:
            yield schema
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from _titled(part, title)


def _published(app: FastAPI, model: str) -> dict[str, Any]:
    """The OpenAPI document, with the bodies' schemas, which the endpoints read themselves."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    vocab_size = app.state.api.served.vocab_size
    document = get_openapi(title=app.title, version="1", routes=app.routes)
    schemas = document["components"]["schemas"]
    for body in (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody):
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schema["properties"]["model"] = {"enum": [model, None]}
        schemas[body.__name__] = schema
    for token in _titled(schemas, TOKEN_ID):
        token["exclusiveMaximum"] = vocab_size
    app.openapi_schema = document
    return document
