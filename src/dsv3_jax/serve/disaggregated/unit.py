"""A process that runs one engine, to read prompts or to decode.

    python -m dsv3_jax.serve.disaggregated.unit FD

FD is its end of a socket pair. The first message there says what to run. The process ends when the
other end is closed, and so never outlives its server. It leaves SIGTERM and SIGINT to the server,
which drains first.
"""

import dataclasses
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import numpy as np
from jaxtyping import UInt32

from dsv3_jax.serve.disaggregated.handover import Handover
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
    Refused,
    Start,
)
from dsv3_jax.serve.disaggregated.transfer import Receiver, Sender
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.load_engine import load_engine
from dsv3_jax.serve.request import EngineStatistics

BEAT_SECONDS = 1.0


def main() -> None:
    """Runs a unit until the server closes its end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        channel = Channel(Connection(int(sys.argv[1])))
    except EOFError:  # the server has ended already
        return
    start = channel.start
    try:
        engine = load_engine(
            start.load,
            start.server,
            start.experts,
            hands_over=start.kind is Kind.PREFILL,
            compiler_options=start.compiler_options,
        )
        engine.warm_up()
    except (ValueError, OSError) as error:
        channel.send(Refused(" ".join(str(error).split())))
        sys.exit(2)
    serve = serve_prefill if start.kind is Kind.PREFILL else serve_decode
    serve(engine, channel)


def serve_prefill(engine: Engine, channel: "Channel") -> None:
    """Reads prompts and hands them over; does not return."""
    layout, key = engine.layout(), channel.start.transfer_key
    senders: dict[Address, Sender] = {}
    address_of: dict[str, Address] = {}

    def failed(request_id: str, reason: str) -> None:
        channel.send(NotHandedOver(request_id, reason))

    channel.ready(engine, engine.statistics().slots, None)
    while True:
        for message in channel.take(waits=not engine.has_work):
            match message:
                case Read(request, made, to):
                    address_of[request.id] = to
                    engine.submit(request, made)
                case Cancel(request_id):
                    address_of.pop(request_id, None)
                    engine.cancel(request_id)
        channel.step(engine)
        for handover in engine.take_handovers():
            to = address_of.pop(handover.request.id)
            if to not in senders:
                senders[to] = Sender(to, key, layout, failed)
            senders[to].put(handover)


def serve_decode(engine: Engine, channel: "Channel") -> None:
    """Adopts what is handed over, and decodes; does not return."""

    def arrived(handover: Handover) -> None:
        channel.send(Adopted(handover.request.id))
        channel.put(handover)

    receiver = Receiver(channel.start.transfer_key, engine.layout(), arrived)
    slots = engine.statistics().slots
    # Some more than there are slots, so that the next is there when one ends.
    channel.ready(engine, slots + max(1, slots // 4), receiver.address)
    while True:
        for message in channel.take(waits=not engine.has_work):
            match message:
                case Handover():
                    constraint = message.request.constraint
                    if constraint is not None:
                        constraint = AskedConstraint(
                            channel, message.request.id, engine.config.vocab_size
                        )
                    request = dataclasses.replace(message.request, constraint=constraint)
                    engine.adopt(dataclasses.replace(message, request=request))
                case Cancel(request_id):
                    engine.cancel(request_id)
        channel.step(engine)


class AskedConstraint:
    """A `Constraint` that asks the coordinator, which has the real one and sees every token."""

    def __init__(self, channel: "Channel", request_id: str, vocab_size: int):
        self._channel, self._request_id = channel, request_id
        self._all = np.full((-(-vocab_size // 32),), 2**32 - 1, np.uint32)

    def allowed(self) -> UInt32[np.ndarray, " words"]:
        """Whatever, where the request has ended meanwhile."""
        words = self._channel.ask(self._request_id)
        return self._all if words is None else words

    def accept(self, token: int) -> None:
        """The coordinator does when the token gets there, which is before it is asked again."""


class Channel:
    """The unit's end of the connection: receives, and says that it lives, in threads."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._inbox: list[Any] = []
        self._masks: SimpleQueue[UInt32[np.ndarray, " words"] | None] = SimpleQueue()
        self._statistics: EngineStatistics | None = None
        self._step_started: float | None = None
        self.start: Start = connection.recv()
        for target in (self._receive, self._beat):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def ready(self, engine: Engine, credits: int, address: Address | None) -> None:
        """Says that requests may come."""
        self._statistics = engine.statistics()
        self.send(Ready(credits=credits, statistics=self._statistics, address=address))

    def step(self, engine: Engine) -> None:
        """Steps the engine and sends what it made."""
        self._step_started = time.monotonic()
        outputs = engine.step()
        self._step_started, self._statistics = None, engine.statistics()
        self.send(Outputs(outputs, self._statistics))

    def send(self, message: Any) -> None:
        """Returns when the message is on its way; ends the process where nobody listens."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            os._exit(0)

    def put(self, message: Any) -> None:
        """Adds to what `take` gives."""
        with self._changed:
            self._inbox.append(message)
            self._changed.notify()

    def take(self, waits: bool) -> list[Any]:
        """The messages since the last call; at least one if it `waits`."""
        with self._changed:
            while waits and not self._inbox:
                self._changed.wait()
            inbox, self._inbox = self._inbox, []
        return inbox

    def ask(self, request_id: str) -> UInt32[np.ndarray, " words"] | None:
        """The tokens that a request's constraint allows."""
        self.send(MaskWanted(request_id))
        return self._masks.get()

    def _receive(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):  # the server has ended, or wants this to end
                os._exit(0)
            if isinstance(message, Mask):
                self._masks.put(message.words)
            else:
                self.put(message)

    def _beat(self) -> None:
        while True:
            started = self._step_started
            seconds = 0.0 if started is None else time.monotonic() - started
            self.send(Beat(self._statistics, seconds))
            time.sleep(BEAT_SECONDS)


if __name__ == "__main__":
    main()
