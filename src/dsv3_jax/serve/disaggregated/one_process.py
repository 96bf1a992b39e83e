"""Prefill and decode in one process, each on devices of its own.

    submit -> waiting -> prefill engine ---------> decode engine -> outputs
                         in its own thread   pages, in host memory

The decode engine is the one that is asked (`TwoMeshEngine`); it lets no more prompts be read than
it has room for.
"""

import threading
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax

from dsv3_jax.config import ServeConfig, ServerConfig
from dsv3_jax.config.checks import require
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.serve.disaggregated.coordinator import total_statistics, unit_servers
from dsv3_jax.serve.disaggregated.handover import Handover, Layout
from dsv3_jax.serve.disaggregated.messages import Kind
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.load_engine import load_engine, load_on_devices
from dsv3_jax.serve.request import EngineStatistics, Output, Request

WAIT_SECONDS = 0.005
"""A step with nothing to decode waits so long for a prompt to be read: then others may come."""


def load_two_meshes(
    load: Callable[..., Transformer],
    server: ServerConfig,
    experts: int,
    *,
    compiler_options: dict[str, Any] | None = None,
) -> "TwoMeshEngine":
    """As `load_engine`, with prefill on the first devices of this process and decode on the next;
    each loads the model."""
    of_kind = unit_servers(server)
    counts = [of_kind[kind].parallel.num_devices for kind in (Kind.PREFILL, Kind.DECODE)]
    needed, found = sum(counts), len(jax.devices())
    rule = (
        f"at least {counts[0]} for prefill and {counts[1]} for decode = {needed}"
        " (parallel.simulated_devices fakes some on CPU)"
    )
    require(found >= needed, "devices of this process", found, rule)
    options = {"compiler_options": compiler_options}
    prefill = load_engine(load, of_kind[Kind.PREFILL], experts, hands_over=True, **options)
    decode = of_kind[Kind.DECODE]
    model, placing = load_on_devices(load, decode, experts, first_device=counts[0])
    return TwoMeshEngine(model, decode.serve, prefill=prefill, **placing, **options)


class TwoMeshEngine(Engine):
    """Decodes what `prefill`, an engine that hands over, reads meanwhile on other devices.

    Of the requests given to it at most its slots and a quarter more are begun: read, handed over or
    decoded. What fails in the prefill engine's thread is raised by the next `step`.
    """

    def __init__(self, model: Transformer, serve: ServeConfig, *, prefill: Engine, **options: Any):
        super().__init__(model, serve, **options)
        slots = serve.slots * len(self.scheduler.pools)
        self._most_begun = slots + max(1, slots // 4)
        self._reader = Reader(prefill)
        # None of these has ended; one that is waiting, or being read, is not in the scheduler.
        self._running: set[str] = set()
        self._waiting: dict[str, tuple[Request, tuple[int, ...]]] = {}
        self._reading: set[str] = set()
        self._given_up: set[str] = set()
        weakref.finalize(self, self._reader.close)  # or the thread would run into Python's end

    def warm_up(self) -> None:
        super().warm_up()
        layout = self._reader.start()
        assert layout == self.layout()

    def submit(self, request: Request, made: Many[int] = ()) -> None:
        self.check(request)
        require(request.id not in self._running, "request id", request.id, "one not running")
        self._running.add(request.id)
        self._waiting[request.id] = request, tuple(made)

    def cancel(self, request_id: str) -> None:
        if self._waiting.pop(request_id, None) is not None:
            self._counters.cancelled += 1
            self._outputs.append(Output(id=request_id, finish="cancelled"))
        elif request_id in self._reading:  # its output, or the handover, is still to come
            self._given_up.add(request_id)
            self._reader.cancel(request_id)
        else:
            super().cancel(request_id)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._reading) or super().has_work

    def step(self) -> list[Output]:
        self._begin_reading()
        waits = bool(self._reading) and not super().has_work
        news = self._reader.take(WAIT_SECONDS if waits else 0.0)
        self._outputs += news.ended
        for handover in news.handovers:
            self.adopt(handover)
            if handover.request.id in self._given_up:
                super().cancel(handover.request.id)
        left = {output.id for output in news.ended} | {h.request.id for h in news.handovers}
        self._reading -= left
        self._given_up -= left
        outputs = super().step()
        self._running -= {output.id for output in outputs if output.finish is not None}
        return outputs

    def statistics(self) -> EngineStatistics:
        own, of_prefill = super().statistics(), self._reader.statistics
        return replace(
            total_statistics([own, of_prefill]),
            waiting=len(self._waiting) + own.waiting,
            prefilling=len(self._reading) + own.prefilling,
            running=own.running,
            slots=own.slots,
            finished=own.finished,
            cancelled=own.cancelled + of_prefill.cancelled,
            is_speculating=own.is_speculating,
        )

    def _begin_reading(self) -> None:
        while self._waiting and len(self._running) - len(self._waiting) < self._most_begun:
            request, made = self._waiting.pop(next(iter(self._waiting)))
            self._reading.add(request.id)
            self._reader.submit(request, made)


@dataclass
class News:
    """What a prefill engine has done since it was last asked."""

    handovers: list[Handover] = field(default_factory=list)
    ended: list[Output] = field(default_factory=list)
    """Of requests that were cancelled before they were handed over."""


class Reader:
    """Steps a prefill engine in a thread of its own while it has work."""

    def __init__(self, engine: Engine):
        self.statistics = engine.statistics()
        """After its last step."""
        self._engine = engine
        self._changed = threading.Condition()
        self._orders: list[Callable[[], None]] = []
        """For between two steps."""
        self._news = News()
        self._failure: Exception | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="prefill", daemon=True)

    def start(self) -> Layout:
        """Warms the engine up and begins; the layout of the pages that it hands over."""
        self._engine.warm_up()
        self.statistics, layout = self._engine.statistics(), self._engine.layout()
        self._thread.start()
        return layout

    def submit(self, request: Request, made: tuple[int, ...]) -> None:
        self._order(partial(self._engine.submit, request, made))

    def cancel(self, request_id: str) -> None:
        """Nothing happens where it is handed over already."""
        self._order(partial(self._engine.cancel, request_id))

    def take(self, wait_seconds: float) -> News:
        """The news, waited for so long at most. Raises what has ended the thread."""
        with self._changed:
            self._changed.wait_for(self._has_news, wait_seconds)
            if self._failure is not None:
                raise self._failure
            news, self._news = self._news, News()
        return news

    def close(self) -> None:
        """Returns when no step runs any more."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _order(self, order: Callable[[], None]) -> None:
        with self._changed:
            self._orders.append(order)
            self._changed.notify_all()

    def _has_news(self) -> bool:
        return bool(self._news.handovers or self._news.ended or self._failure)

    def _run(self) -> None:
        try:
            while self._take_orders():
                ended = self._engine.step()
                handovers, statistics = self._engine.take_handovers(), self._engine.statistics()
                with self._changed:
                    self._news.ended += ended
                    self._news.handovers += handovers
                    self.statistics = statistics
                    self._changed.notify_all()
        except Exception as error:  # whatever it is, `take` raises it
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _take_orders(self) -> bool:
        """Waits for work and gives it to the engine; False when it is time to end."""
        with self._changed:
            while not (self._orders or self._is_closing or self._engine.has_work):
                self._changed.wait()
            orders, self._orders = self._orders, []
            is_closing = self._is_closing
        for order in orders:
            order()
        return not is_closing
