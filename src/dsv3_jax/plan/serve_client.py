"""The client of `dsv3 bench serve`: sends requests at their times, notes when tokens come."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from typing import Any

import httpx

from dsv3_jax.plan.bench_serve import Arrival, Seen

WORDS = "the model of an expert returns a token to its router and adds what two layers keep"
"""Prompts of no particular text are random tokens of this one."""
TIMEOUT = httpx.Timeout(None, connect=30)


async def drive(
    url: str, arrivals: Sequence[Arrival], *, seed: int, key: str | None
) -> tuple[list[Seen], dict[str, Any]]:
    """What clients saw of `arrivals`, in their order, and the server's gauges after them.

    Raises ValueError for a server that cannot be reached or lets nobody in.
    """
    headers = {"authorization": f"Bearer {key}"} if key is not None else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=TIMEOUT, limits=limits
    ) as client:
        tokens = await _vocabulary(client)
        chance = random.Random(seed)
        began = time.perf_counter() + 0.1
        tasks = []
        for arrival in arrivals:
            prompt = arrival.prompt
            if prompt is None:
                prompt = chance.choices(tokens, k=arrival.prompt_tokens)
            await asyncio.sleep(max(began + arrival.seconds - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(_ask(client, prompt, arrival.max_tokens, began)))
        seen = await asyncio.gather(*tasks)
        return seen, (await client.get("/stats")).json()


async def _vocabulary(client: httpx.AsyncClient) -> list[int]:
    try:
        response = await client.post("/tokenize", json={"prompt": WORDS})
    except httpx.HTTPError as error:
        expected = "expected a dsv3 server there"
        raise ValueError(f"{client.base_url} cannot be reached ({error}), {expected}") from error
    if response.status_code != 200:
        said = response.text[:200]
        raise ValueError(f"{client.base_url} answers {response.status_code}: {said}")
    return response.json()["tokens"]


async def _ask(
    client: httpx.AsyncClient, prompt: str | list[int], max_tokens: int, began: float
) -> Seen:
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = time.perf_counter()
    first = last = None
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return _refused(response, sent - began, time.perf_counter() - sent)
            content = bytearray()
            async for chunk in response.aiter_raw():
                if b'"choices": [{' in chunk:  # tokens; the last events have usage or an error
                    last = time.perf_counter()
                    first = first or last
                    content.clear()
                content += chunk
    except httpx.HTTPError as error:
        return Seen(sent_at=sent - began, status=type(error).__name__)
    return _read(content, sent - began, sent, first, last)


def _refused(response: httpx.Response, sent_at: float, seconds: float) -> Seen:
    after = response.headers.get("retry-after")
    return Seen(
        sent_at=sent_at,
        status=str(response.status_code),
        e2e=seconds,
        retry_after=None if after is None else int(after),
    )


def _read(
    content: bytearray, sent_at: float, sent: float, first: float | None, last: float | None
) -> Seen:
    """From the last part of a stream, which has its usage."""
    usage = None
    for line in content.decode().split("\n\n"):
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            usage = event.get("usage") or usage
            if "error" in event:
                return Seen(sent_at=sent_at, status=str(event["error"]["code"]))
    if usage is None or first is None or last is None:
        return Seen(sent_at=sent_at, status="cut short")
    tokens = usage["completion_tokens"]
    return Seen(
        sent_at=sent_at,
        status="200",
        ttft=first - sent,
        tpot=(last - first) / (tokens - 1) if tokens > 1 else None,
        e2e=last - sent,
        prompt_tokens=usage["prompt_tokens"],
        tokens=tokens,
    )
