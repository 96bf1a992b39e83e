"""An engine in a thread of its own: the `Backend` of a server in one process."""

import logging
import threading
from collections.abc import Callable

from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.request import EngineStatistics, Output, Request

_log = logging.getLogger("dsv3_jax.serve")


class EngineThread:
    """Steps `engine` while it has work. A `Backend`.

    An exception of a step is the end: every request gets it as its error, and `failure` says it.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._changed = threading.Condition()
        self._submitted: list[Request] = []
        self._cancelled: list[str] = []
        self._running: set[str] = set()
        self._is_stopping = False
        self._failure: str | None = None
        self._statistics = engine.statistics()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._deliver: Callable[[list[Output]], None] = lambda outputs: None

    @property
    def max_seq_len(self) -> int:
        return self._engine.max_seq_len

    def start(self, deliver: Callable[[list[Output]], None]) -> None:
        """Warms the engine up and begins; `deliver` is called with the outputs of each step, in the
        engine's thread."""
        self._engine.warm_up()
        self._deliver = deliver
        self._thread.start()

    def submit(self, request: Request) -> None:
        self._engine.check(request)
        with self._changed:
            if self._failure is not None or self._is_stopping:
                raise ValueError(f"the engine has ended: {self._failure or 'it was stopped'}")
            self._submitted.append(request)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            self._cancelled.append(request_id)
            self._changed.notify()

    def statistics(self) -> EngineStatistics:
        return self._statistics

    def failure(self) -> str | None:
        return self._failure

    def stop(self) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_in():
                outputs = self._engine.step()
                self._statistics = self._engine.statistics()
                self._hand_out(outputs)
            ended = "cancelled", None
        except Exception as error:  # whatever it is, nobody may wait for an answer for ever
            _log.exception("the engine has failed")
            self._failure = f"{type(error).__name__}: {error}"
            ended = "error", self._failure
        with self._changed:
            left = self._running | {request.id for request in self._submitted}
            self._is_stopping, self._submitted = True, []
        finish, message = ended
        self._hand_out([Output(id=name, finish=finish, error=message) for name in left])

    def _take_in(self) -> bool:
        """Waits for work and gives it to the engine; False when it is time to end."""
        with self._changed:
            while not (self._submitted or self._cancelled or self._is_stopping):
                if self._engine.has_work:
                    break
                self._changed.wait()
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
            is_stopping = self._is_stopping
        for request in submitted:
            self._engine.submit(request)
            self._running.add(request.id)
        for request_id in cancelled:
            self._engine.cancel(request_id)
        return not is_stopping

    def _hand_out(self, outputs: list[Output]) -> None:
        self._running -= {output.id for output in outputs if output.finish is not None}
        if outputs:
            self._deliver(outputs)
