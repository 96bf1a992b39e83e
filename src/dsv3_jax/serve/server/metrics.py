"""Numbers for Prometheus and for the page: latencies, the queue, the cache, refusals."""

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from dsv3_jax.serve.request import EngineStatistics
from dsv3_jax.serve.server.admission import Admission
from dsv3_jax.serve.server.answers import Answer, Bridge

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0)
GAUGES = {
    "slots": "Requests that can be decoded together.",
    "prefilling": "Requests whose prompt is being read.",
    "pages": "Pages of the latent cache.",
    "pages_used": "Pages of running requests.",
    "pages_cached": "Pages that wait for a prompt that begins alike.",
    "host_pages_cached": "Such pages in host memory.",
    "cache_bytes_per_token": "Bytes of the cache for a token, over all layers.",
    "device_load_max_over_mean": "The busiest device's tokens to experts over the mean.",
    "is_speculating": "1 while MTP drafts tokens.",
}
COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "cached_prompt_tokens": "Those of them found in the cache of prefixes.",
    "generated_tokens": "Tokens of answers.",
    "decode_steps": "Steps of decoding.",
    "drafted_tokens": "Tokens drafted by MTP.",
    "accepted_tokens": "Drafts that were right.",
    "preemptions": "Requests that gave up their pages for a while.",
    "cancelled": "Requests that were cancelled.",
    "expert_placements": "How often experts were placed anew by load.",
    "compilations": "Of the model's programs; constant after warm-up.",
    "prefill_seconds": "Time spent on prompts.",
    "decode_seconds": "Time spent on answers.",
}


class Meters:
    """Counts what the API does; reads the engine's and the admission's state when asked."""

    def __init__(self, bridge: Bridge, admission: Admission):
        self._bridge = bridge
        self._admission = admission
        self._started = time.monotonic()
        self._registry = CollectorRegistry()
        self._ttft = self._histogram("time_to_first_token_seconds", "Until a first token.", SECONDS)
        self._tpot = self._histogram("time_per_token_seconds", "Each after it.", TOKEN_SECONDS)
        self._e2e = self._histogram("request_seconds", "Until an answer's end.", SECONDS)
        self._answers = self._counter("answers", "Bodies answered.", "endpoint", "finish")
        self._errors = self._counter("errors", "Answers that were errors.", "status")
        self._rejected = self._counter("rejected", "Bodies not admitted.", "reason")
        self._registry.register(self)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"dsv3_{name}", text, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"dsv3_{name}", text, labels, registry=self._registry)

    def answered(self, endpoint: str, answer: Answer, finish: str, now: float) -> None:
        """One body has its answer, or its client has left."""
        ticket, tokens = answer.ticket, answer.usage.completion_tokens
        self._answers.labels(endpoint, finish).inc()
        self._e2e.observe(now - ticket.admitted_at)
        if ticket.first_token_at is not None:
            self._ttft.observe(ticket.first_token_at - ticket.admitted_at)
            if tokens > ticket.choices:
                steps = (tokens - ticket.choices) / ticket.choices
                self._tpot.observe((now - ticket.first_token_at) / steps)

    def refused(self, status: int, reason: str | None) -> None:
        """One request got an error; with a `reason` it was not let in."""
        self._errors.labels(str(status)).inc()
        if reason is not None:
            self._rejected.labels(reason).inc()

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """What is read at the moment it is asked for, in prometheus_client's protocol."""
        statistics = self._bridge.backend.statistics()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"dsv3_{name}", text, float(getattr(statistics, name)))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"dsv3_{name}", text, float(getattr(statistics, name)))
        yield GaugeMetricFamily("dsv3_waiting", "Choices that wait.", self._admission.waiting)
        yield GaugeMetricFamily("dsv3_running", "Choices that get tokens.", self._admission.running)
        load = expert_load_max_over_mean(statistics)
        if load is not None:
            text = "The busiest expert's tokens over the mean."
            yield GaugeMetricFamily("dsv3_expert_load_max_over_mean", text, load)

    def snapshot(self) -> dict[str, Any]:
        """The page's gauges. Latencies are of the last minute, in seconds, or null."""
        now, statistics = time.monotonic(), self._bridge.backend.statistics()
        admission = self._admission
        return {
            "uptime_seconds": now - self._started,
            "waiting": admission.waiting,
            "running": admission.running,
            "slots": statistics.slots,
            "pages": statistics.pages,
            "pages_used": statistics.pages_used,
            "pages_cached": statistics.pages_cached,
            "cache_bytes_per_token": statistics.cache_bytes_per_token,
            "tokens_per_second": admission.tokens.per_second(now),
            "ttft_p50": admission.ttft.quantile(0.5, now),
            "ttft_p95": admission.ttft.quantile(0.95, now),
            "tpot_p50": admission.tpot.quantile(0.5, now),
            "tpot_p95": admission.tpot.quantile(0.95, now),
            "prefix_hits": _share(statistics.cached_prompt_tokens, statistics.prompt_tokens),
            "acceptance": _share(statistics.accepted_tokens, statistics.drafted_tokens),
            "is_speculating": statistics.is_speculating,
            "expert_load_max_over_mean": expert_load_max_over_mean(statistics),
        }


def expert_load_max_over_mean(statistics: EngineStatistics) -> float | None:
    """The busiest expert's tokens over the mean; None before the first token."""
    total = sum(statistics.expert_load)
    if not total:
        return None
    return max(statistics.expert_load) * len(statistics.expert_load) / total


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
