"""Load for a server, and what its clients saw: latencies, throughput, errors.

Arrivals are Poisson or a recorded trace, and do not wait for answers, as people do not: a server
that is too slow gets longer queues, and the figures say so. A request that is refused is counted by
its status and not sent again.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_jax.config.checks import require

QUANTILES = (0.5, 0.95, 0.99)
TRACE_KEYS = ("arrival", "prompt", "prompt_tokens", "max_tokens")
READY = "dsv3 serve: "
"""What the line begins with that `dsv3 serve` prints when it is ready: `NAME at URL (...)`."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request: when, after the beginning, and what it asks for."""

    seconds: float
    prompt: str | None
    """None: `prompt_tokens` random tokens."""
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the client saw of one request; times in seconds, from its sending on."""

    sent_at: float
    """After the beginning."""
    status: str
    """The HTTP status, or the name of what went wrong."""
    ttft: float | None = None
    tpot: float | None = None
    """Time per token after the first; None for answers of one token."""
    e2e: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    retry_after: int | None = None

    @property
    def is_answered(self) -> bool:
        """Whether it had its whole answer."""
        return self.status == "200"


@dataclass(frozen=True, kw_only=True)
class ServeReport:
    """Latencies in seconds, by quantile (`p50`, `p95`, `p99`), of requests that were answered."""

    requests: int
    answered: int
    errors: dict[str, int]
    """By status."""
    seconds: float
    """From the first request to the last answer."""
    requests_per_second: float
    tokens_per_second: float
    prompt_tokens_per_second: float
    ttft_seconds: dict[str, float | None]
    tpot_seconds: dict[str, float | None]
    e2e_seconds: dict[str, float | None]
    server: dict[str, Any]
    """Its own gauges after the last answer (/stats)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dsv3 bench serve`, those aside that all benches have."""
    parser.add_argument("target", help="a server's URL, or a checkpoint to serve for it")
    parser.add_argument("--rate", type=float, help="requests a second, Poisson (default 4)")
    parser.add_argument("--requests", type=int, help="how many (default 64)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="arrivals, JSON lines")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="(default 64)")
    parser.add_argument("--max-tokens", type=int, default=64, help="(default 64)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument("--key", help="an API key of the server")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="config of the server of a checkpoint",
    )


def run(options: argparse.Namespace) -> int:
    """`dsv3 bench serve`. Raises ValueError for options that cannot be."""
    arrivals = _arrivals(options)
    from dsv3_jax.plan.serve_client import drive

    is_url = options.target.startswith(("http://", "https://"))
    require(not (is_url and options.set), "--set", options.set, "none: that server is running")
    serving = contextlib.nullcontext(options.target)
    with serving if is_url else served(options.target, options.set) as url:
        seen, server = asyncio.run(drive(url, arrivals, seed=options.seed, key=options.key))
    report = summarise(seen, server)
    if options.png is not None:
        from dsv3_jax.plan.serve_plot import draw

        draw(seen, report, options.png)
    print(json.dumps(dataclasses.asdict(report)) if options.json else as_text(report))
    return 0


def poisson(
    rate: float, requests: int, prompt_tokens: int, max_tokens: int, seed: int
) -> list[Arrival]:
    """`requests` arrivals, `rate` a second, at random and independent of each other."""
    chance, at, made = random.Random(seed), 0.0, []
    for _ in range(requests):
        made.append(
            Arrival(seconds=at, prompt=None, prompt_tokens=prompt_tokens, max_tokens=max_tokens)
        )
        at += chance.expovariate(rate)
    return made


def read_trace(path: Path, prompt_tokens: int, max_tokens: int) -> list[Arrival]:
    """Recorded arrivals, in the order of their times.

    A line is an object with `arrival` (seconds) and, if they differ from the defaults, `prompt` (a
    text) or `prompt_tokens`, and `max_tokens`. Raises ValueError that names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"--trace {path}: {error.strerror}, expected JSON lines") from error
    made = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            require(isinstance(content, dict), "line", content, "an object")
            unknown = next((key for key in content if key not in TRACE_KEYS), None)
            require(unknown is None, "field", unknown, "one of " + ", ".join(TRACE_KEYS))
            prompt = content.get("prompt")
            require(prompt is None or isinstance(prompt, str), "prompt", prompt, "a text")
            made.append(
                Arrival(
                    seconds=_number(content, "arrival", None, 0, float),
                    prompt=prompt,
                    prompt_tokens=_number(content, "prompt_tokens", prompt_tokens, 1, int),
                    max_tokens=_number(content, "max_tokens", max_tokens, 1, int),
                )
            )
        except ValueError as error:
            raise ValueError(f"--trace {path}, line {number}: {error}") from error
    require(len(made) > 0, f"--trace {path}", "empty", "at least one arrival")
    return sorted(made, key=lambda arrival: arrival.seconds)


def summarise(seen: Sequence[Seen], server: dict[str, Any]) -> ServeReport:
    """What a list of requests comes to."""
    answered = [each for each in seen if each.is_answered]
    ends = [each.sent_at + (each.e2e or 0.0) for each in seen]
    seconds = max(ends) - min(each.sent_at for each in seen)

    def rate(amount: int) -> float:
        return amount / seconds if seconds > 0 else 0.0

    return ServeReport(
        requests=len(seen),
        answered=len(answered),
        errors=dict(Counter(each.status for each in seen if not each.is_answered)),
        seconds=seconds,
        requests_per_second=rate(len(answered)),
        tokens_per_second=rate(sum(each.tokens for each in answered)),
        prompt_tokens_per_second=rate(sum(each.prompt_tokens for each in answered)),
        ttft_seconds=quantiles([each.ttft for each in answered]),
        tpot_seconds=quantiles([each.tpot for each in answered]),
        e2e_seconds=quantiles([each.e2e for each in answered]),
        server=server,
    )


def quantiles(values: Sequence[float | None]) -> dict[str, float | None]:
    """By their names; each is a value that was seen, the smallest with that share at or below it.

    >>> quantiles([1.0, 2.0, None, 3.0])
    {'p50': 2.0, 'p95': 3.0, 'p99': 3.0}
    """
    there = sorted(value for value in values if value is not None)
    return {
        f"p{share * 100:g}": there[math.ceil(share * len(there)) - 1] if there else None
        for share in QUANTILES
    }


def as_text(report: ServeReport) -> str:
    """A few lines to read."""
    errors = ", ".join(f"{count} x {status}" for status, count in sorted(report.errors.items()))
    lines = [
        f"serve: {report.answered} of {report.requests} requests answered in"
        f" {report.seconds:.1f} s{f'; {errors}' if errors else ''}",
        f"  {report.tokens_per_second:,.0f} tokens/s, {report.requests_per_second:.2f}"
        f" requests/s, {report.prompt_tokens_per_second:,.0f} prompt tokens/s",
    ]
    for name, values in (
        ("time to first token", report.ttft_seconds),
        ("time per token", report.tpot_seconds),
        ("whole answer", report.e2e_seconds),
    ):
        shown = [
            f"{quantile} {value * 1e3:,.1f} ms"
            for quantile, value in values.items()
            if value is not None
        ]
        lines.append(f"  {name:<20} {'  '.join(shown) or 'none'}")
    return "\n".join(lines)


@contextlib.contextmanager
def served(checkpoint: str, settings: Sequence[str]) -> Iterator[str]:
    """The URL of a `dsv3 serve` of its own for a checkpoint.

    Raises ValueError where it does not start; what it says goes to standard error.
    """
    command = [sys.executable, "-m", "dsv3_jax.cli", "serve", checkpoint, "--port", "0"]
    command += [f"--set={setting}" for setting in settings]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            if not line.startswith(READY):
                raise ValueError(f"{checkpoint} is not served, expected what dsv3 serve takes")
            yield line.partition(" at ")[2].split()[0]
        finally:
            server.send_signal(signal.SIGTERM)


def _arrivals(options: argparse.Namespace) -> list[Arrival]:
    for name in ("prompt_tokens", "max_tokens"):
        value = getattr(options, name)
        require(value >= 1, f"--{name.replace('_', '-')}", value, "at least 1")
    if options.trace is not None:
        for name in ("rate", "requests"):
            require(getattr(options, name) is None, f"--{name}", getattr(options, name), "no trace")
        return read_trace(options.trace, options.prompt_tokens, options.max_tokens)
    rate = 4.0 if options.rate is None else options.rate
    requests = 64 if options.requests is None else options.requests
    require(0 < rate < math.inf, "--rate", rate, "a positive number")
    require(requests >= 1, "--requests", requests, "at least 1")
    return poisson(rate, requests, options.prompt_tokens, options.max_tokens, options.seed)


def _number(content: dict, name: str, default: Any, least: int, kind: type) -> Any:
    value = content.get(name, default)
    is_number = isinstance(value, int if kind is int else int | float)
    holds = is_number and not isinstance(value, bool) and least <= value < math.inf
    require(holds, name, value, f"a number of at least {least}")
    return kind(value)
