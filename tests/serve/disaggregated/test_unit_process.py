"""A unit's process, without a model: it would load for a minute."""

import dataclasses
import os
import queue
import signal
import time
from functools import partial

import pytest

from dsv3_jax.config import ServerConfig
from dsv3_jax.serve.disaggregated.messages import Beat, Kind, Start
from dsv3_jax.serve.disaggregated.unit_process import Lost, UnitProcess
from tests.serve.disaggregated.tiny import SERVE

START = Start(
    name="decode-0",
    kind=Kind.DECODE,
    load=partial(time.sleep, 60),
    server=ServerConfig(serve=SERVE),
    first_device=0,
    experts=0,
    transfer_key=b"key",
    compiler_options=None,
)


@pytest.mark.slow
def test_a_unit_is_started_again_and_ends_with_its_server():
    heard: queue.SimpleQueue = queue.SimpleQueue()
    unit = UnitProcess(START, lambda name, message: heard.put((name, message)))
    unit.start()
    assert heard.get(timeout=100) == ("decode-0", Beat(None, 0.0))
    first = unit.pid
    os.kill(first, signal.SIGTERM)  # is the server's: the unit goes on
    heard.get(timeout=10)
    os.kill(first, signal.SIGKILL)
    at = time.monotonic()
    while not isinstance(message := heard.get(timeout=10)[1], Lost):
        assert isinstance(message, Beat)
    assert message == Lost("was killed by signal 9") and time.monotonic() - at < 5
    assert isinstance(heard.get(timeout=100)[1], Beat)
    second = unit.pid
    assert second != first
    at = time.monotonic()
    unit.stop()  # closes the socket, as the kernel does when a server is killed
    assert time.monotonic() - at < 4
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


def test_what_cannot_be_sent_to_a_unit_is_said_before_it_is_started():
    with pytest.raises((AttributeError, TypeError), match=r"pickle|local object"):
        UnitProcess(dataclasses.replace(START, load=lambda: None), lambda name, message: None)
