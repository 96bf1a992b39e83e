"""Handovers between units: a thread for each connection, with a key that only units have."""

import logging
import threading
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from queue import SimpleQueue
from typing import Any

from dsv3_jax.serve.disaggregated.handover import (
    Handover,
    HandoverError,
    Layout,
    answer,
    introduce,
    receive,
    send,
    welcome,
)
from dsv3_jax.serve.disaggregated.messages import Address

HOST = "127.0.0.1"
_log = logging.getLogger("dsv3_jax.serve")


class Sender:
    """Sends handovers to one decode unit, one after the other.

    `failed` is called with a request's id and the reason where one did not arrive whole.
    """

    def __init__(
        self, address: Address, key: bytes, layout: Layout, failed: Callable[[str, str], None]
    ):
        self._address, self._key, self._layout, self._failed = address, key, layout, failed
        self._queue: SimpleQueue[Handover] = SimpleQueue()
        threading.Thread(target=self._run, name="sender", daemon=True).start()

    def put(self, handover: Handover) -> None:
        """Returns at once."""
        self._queue.put(handover)

    def _run(self) -> None:
        connection: Connection | None = None
        while True:
            handover = self._queue.get()
            try:
                if connection is None:
                    connection = self._connect()
                send(connection, handover)
            except HandoverError as error:
                self._failed(handover.request.id, str(error))
            except (OSError, EOFError, AuthenticationError) as error:
                if connection is not None:
                    connection.close()
                connection = None
                reason = f"the connection has ended: {type(error).__name__} {error}".rstrip()
                self._failed(handover.request.id, reason)

    def _connect(self) -> Connection:
        connection = Client(self._address, authkey=self._key)
        try:
            introduce(connection, self._layout)
        except BaseException:
            connection.close()
            raise
        return connection


class Receiver:
    """Gives `arrived` every handover that arrives whole, from any number of senders."""

    def __init__(self, key: bytes, layout: Layout, arrived: Callable[[Handover], None]):
        self._layout, self._arrived = layout, arrived
        self._listener = Listener((HOST, 0), authkey=key)
        threading.Thread(target=self._accept, name="receiver", daemon=True).start()

    @property
    def address(self) -> Address:
        """Where senders connect to."""
        address: Any = self._listener.address  # typed for other kinds of sockets too
        return address

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except (OSError, EOFError, AuthenticationError) as error:
                _log.warning("a connection for handovers was refused: %s", error)
                continue
            threading.Thread(target=self._take, args=[connection], daemon=True).start()

    def _take(self, connection: Connection) -> None:
        with connection:
            try:
                if not welcome(connection, self._layout):
                    return
                while True:
                    self._take_one(connection)
            except EOFError:
                return  # the sender has ended
            except OSError as error:
                _log.warning("a connection for handovers has ended: %s", error)

    def _take_one(self, connection: Connection) -> None:
        try:
            handover = receive(connection, self._layout)
        except HandoverError as error:
            answer(connection, str(error))
            return
        self._arrived(handover)
        answer(connection, None)
