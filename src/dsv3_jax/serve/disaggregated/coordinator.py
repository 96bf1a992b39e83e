"""A `Backend` over units in other processes."""

import logging
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from dsv3_jax.config import ModelConfig, ServerConfig
from dsv3_jax.config.checks import require
from dsv3_jax.serve.disaggregated.dispatch import Dispatcher, Ended, Job
from dsv3_jax.serve.disaggregated.messages import (
    Address,
    Adopted,
    Beat,
    Cancel,
    Kind,
    Mask,
    MaskWanted,
    NotHandedOver,
    Outputs,
    Read,
    Ready,
    Start,
)
from dsv3_jax.serve.disaggregated.unit_process import GivenUp, Lost, UnitProcess, check_gpus
from dsv3_jax.serve.engine import check_tokens, longest_request
from dsv3_jax.serve.request import EngineStatistics, Output, Request

GAUGES = (
    "waiting",
    "prefilling",
    "running",
    "pages",
    "pages_used",
    "pages_cached",
    "host_pages_cached",
)
"""Of units that live. Those of one that was lost are zero; its counters stay."""
COUNTERS = (
    "prompt_tokens",
    "cached_prompt_tokens",
    "generated_tokens",
    "decode_steps",
    "drafted_tokens",
    "accepted_tokens",
    "preemptions",
    "expert_placements",
    "compilations",
    "prefill_seconds",
    "decode_seconds",
)
_log = logging.getLogger("dsv3_jax.serve")


class Coordinator:
    """Serves the model that `load` makes, in each of `serve.prefill_units` + `serve.decode_units`
    processes. `load` has to be picklable; `config` is its model's. A `Backend`.

    A request whose unit is lost goes on at another unit of that kind, and ends with an error where
    none is there; one that is still waiting waits for the unit's restart.
    """

    def __init__(
        self,
        config: ModelConfig,
        server: ServerConfig,
        load: Callable[..., Any],
        *,
        compiler_options: dict[str, Any] | None = None,
    ):
        server.check_model(config)
        serve = server.serve
        self._config, self._serve = config, serve
        self._decode_devices = server.parallel.num_devices
        self._longest = longest_request(config, serve)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._dispatcher = Dispatcher(serve.page_size if serve.prefix_cache else None)
        self._addresses: dict[str, Address] = {}
        self._statistics: dict[str, EngineStatistics] = {}
        self._lost_counters = EngineStatistics()
        self._starting: set[str] = set()
        """Units that have not been ready yet."""
        self._given_up: dict[str, str] = {}
        self._failure: str | None = None
        self._is_stopping = False
        self._delivery: SimpleQueue[list[Output] | None] = SimpleQueue()
        self._deliver: Callable[[list[Output]], None] = lambda outputs: None
        self._thread = threading.Thread(target=self._hand_out, name="delivery", daemon=True)
        key = secrets.token_bytes(32)
        counts = {Kind.PREFILL: serve.prefill_units, Kind.DECODE: serve.decode_units}
        of_kind = unit_servers(server)
        kinds = [kind for kind, count in counts.items() for _ in range(count)]
        sizes = [of_kind[kind].parallel.num_devices for kind in kinds]
        if not server.parallel.simulated_devices:
            check_gpus(sum(sizes), os.environ)
        starts = [
            Start(
                name=f"{kind}-{kinds[:number].count(kind)}",
                kind=kind,
                load=load,
                server=of_kind[kind],
                first_device=sum(sizes[:number]),
                experts=config.n_routed_experts,
                transfer_key=key,
                compiler_options=compiler_options,
            )
            for number, kind in enumerate(kinds)
        ]
        self.units = {start.name: UnitProcess(start, self._hear) for start in starts}

    @property
    def max_seq_len(self) -> int:
        return self._longest

    def start(self, deliver: Callable[[list[Output]], None]) -> None:
        """Returns when all units are ready. Raises RuntimeError if one cannot be, or on `stop`."""
        self._deliver = deliver
        self._thread.start()
        self._starting = set(self.units)
        for unit in self.units.values():
            unit.start()
        with self._changed:
            self._changed.wait_for(
                lambda: self._given_up or self._is_stopping or not self._starting
            )
            reasons = [f"{name} {end}" for name, end in self._given_up.items()]
            if self._is_stopping:
                reasons.append("stopped while units were starting")
        if reasons:
            self.stop()
            raise RuntimeError("; ".join(reasons))

    def submit(self, request: Request) -> None:
        check_tokens(request, self._config.vocab_size)
        pages = self._serve.num_pages(self._config.max_position_embeddings)
        longest = min(self._longest, pages * self._serve.page_size)
        total = len(request.prompt) + request.max_tokens
        require(total <= longest, "prompt tokens plus max_tokens", total, f"at most {longest}")
        with self._lock:
            if self._failure is not None or self._is_stopping:
                raise ValueError(f"the engine has ended: {self._failure or 'it was stopped'}")
            self._dispatcher.add(request)
            self._assign()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            self._tell(self._dispatcher.end(request_id, "cancelled"))
            self._assign()

    def statistics(self) -> EngineStatistics:
        """Sums over the units; `slots` are those of the decode units."""
        with self._lock:
            units = list(self._statistics.values())
            decoding = [s for n, s in self._statistics.items() if self.units[n].kind == Kind.DECODE]
            waiting, dispatcher = self._dispatcher.waiting, self._dispatcher
            finished, cancelled = dispatcher.finished, dispatcher.cancelled
            total = total_statistics(units, self._lost_counters)
        return replace(
            total,
            waiting=waiting + total.waiting,
            slots=self._serve.slots * self._decode_devices * self._serve.decode_units,
            finished=finished,
            cancelled=cancelled,
            is_speculating=any(unit.is_speculating for unit in decoding),
        )

    def failure(self) -> str | None:
        return self._failure

    @property
    def retries(self) -> int:
        """How often a request was begun again, for its unit was lost or its handover damaged."""
        return self._dispatcher.retries

    def ready_units(self) -> list[str]:
        """Names of the units that take requests now."""
        with self._lock:
            return [name for kind in Kind for name in self._dispatcher.units(kind)]

    def stop(self) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
            self._tell(self._dispatcher.end_all("cancelled"))
        for unit in self.units.values():
            unit.stop()
        self._delivery.put(None)
        if self._thread.is_alive():
            self._thread.join()

    # What units say, each in a thread of its own

    def _hear(self, name: str, message: Any) -> None:
        with self._changed:
            match message:
                case Ready():
                    self._unit_ready(name, message)
                case Beat(statistics, _):
                    if statistics is not None:
                        self._statistics[name] = statistics
                case Adopted(attempt):
                    self._dispatcher.adopted(attempt)
                    if self._dispatcher.job_of(attempt) is None:
                        self.units[name].send(Cancel(attempt))
                case NotHandedOver(attempt, reason):
                    _log.warning("%s could not hand a request over: %s", name, reason)
                    self._tell(self._dispatcher.not_handed_over(attempt, reason))
                case Outputs(outputs, statistics):
                    self._statistics[name] = statistics
                    self._take_outputs(name, outputs)
                case MaskWanted(attempt):
                    self.units[name].send(self._mask(attempt))
                case Lost(reason):
                    self._unit_lost(name, reason)
                case GivenUp(reason):
                    self._unit_lost(name, reason)
                    self._unit_given_up(name, reason)
            self._assign()

    def _unit_ready(self, name: str, ready: Ready) -> None:
        _log.info("%s is ready", name)
        self._statistics[name] = ready.statistics
        if ready.address is not None:
            self._addresses[name] = ready.address
        self._dispatcher.unit_ready(name, self.units[name].kind, ready.credits)
        self._starting.discard(name)
        self._changed.notify_all()

    def _unit_lost(self, name: str, reason: str) -> None:
        last = self._statistics.pop(name, None)
        if last is not None:
            self._lost_counters = _sum([self._lost_counters, last])
        self._tell(self._dispatcher.unit_lost(name, reason))

    def _unit_given_up(self, name: str, reason: str) -> None:
        self._given_up[name] = reason
        kind = self.units[name].kind
        alike = [other.name for other in self.units.values() if other.kind == kind]
        if all(other in self._given_up for other in alike):
            self._failure = f"no {kind} unit can be started: {name} {reason}"
            self._tell(self._dispatcher.end_all("error", self._failure))
        self._changed.notify_all()

    def _take_outputs(self, name: str, outputs: list[Output]) -> None:
        delivered = []
        for output in outputs:
            job = self._dispatcher.job_of(output.id)
            if job is None:
                if output.finish is None:
                    self.units[name].send(Cancel(output.id))
            elif self._accept(job, output.tokens):
                delivered.append(self._dispatcher.output(output))
        if delivered:
            self._delivery.put(delivered)

    def _accept(self, job: Job, tokens: tuple[int, ...]) -> bool:
        """Moves a request's constraint on; False, and the request has ended, if it fails."""
        constraint = job.request.constraint
        if constraint is None:
            return True
        try:
            for token in tokens:
                if token not in job.request.stop_tokens:
                    constraint.accept(token)
        except Exception as error:  # a constraint may be anybody's code; the units go on
            self._fail(job, error)
            return False
        return True

    def _mask(self, attempt: str) -> Mask:
        job = self._dispatcher.job_of(attempt)
        if job is None or job.request.constraint is None:
            return Mask(None)
        try:
            return Mask(job.request.constraint.allowed())
        except Exception as error:  # as above
            self._fail(job, error)
            return Mask(None)

    def _fail(self, job: Job, error: Exception) -> None:
        _log.error("a constraint has failed: %s", error)
        message = f"{type(error).__name__}: {error}"
        self._tell(self._dispatcher.end(job.request.id, "error", message))

    # What units are told

    def _assign(self) -> None:
        for job in self._dispatcher.assign():
            assert job.prefill is not None and job.decode is not None
            to = self._addresses[job.decode]
            self.units[job.prefill].send(Read(job.for_units, tuple(job.made), to))

    def _tell(self, ended: Ended) -> None:
        for name, attempt in ended.cancels:
            self.units[name].send(Cancel(attempt))
        if ended.outputs:
            self._delivery.put(ended.outputs)

    def _hand_out(self) -> None:
        while (outputs := self._delivery.get()) is not None:
            self._deliver(outputs)


def unit_servers(server: ServerConfig) -> dict[Kind, ServerConfig]:
    """What a unit of each kind is told: to serve alone, on its own mesh."""
    changes = {"disaggregated": False, "unit_processes": True, "prefill_mesh": None}
    decode = replace(server, serve=replace(server.serve, **changes))
    return {Kind.PREFILL: replace(decode, parallel=server.prefill_parallel), Kind.DECODE: decode}


def total_statistics(
    units: list[EngineStatistics], lost: EngineStatistics | None = None
) -> EngineStatistics:
    """Gauges of the units, and counters of them and of those that were `lost`."""
    gauges: dict[str, Any] = {name: sum(getattr(unit, name) for unit in units) for name in GAUGES}
    return replace(
        _sum(units if lost is None else [lost, *units]),
        cache_bytes_per_token=max((u.cache_bytes_per_token for u in units), default=0),
        device_load_max_over_mean=max((u.device_load_max_over_mean for u in units), default=1.0),
        **gauges,
    )


def _sum(parts: list[EngineStatistics]) -> EngineStatistics:
    """Of the counters; gauges are zero."""
    counters: dict[str, Any] = {
        name: sum(getattr(part, name) for part in parts) for name in COUNTERS
    }
    loads = [part.expert_load for part in parts if part.expert_load]
    load = tuple(sum(of_expert) for of_expert in zip(*loads, strict=True))
    return EngineStatistics(expert_load=load, **counters)
