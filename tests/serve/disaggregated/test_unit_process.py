"""A unit's process, without a model: it would load for a minute."""

import dataclasses
import os
import queue
import signal
import time
from functools import partial

import pytest

from dsv3_jax.config import ParallelConfig, ServerConfig
from dsv3_jax.serve.disaggregated.messages import Beat, Kind, Start
from dsv3_jax.serve.disaggregated.unit_process import (
    Lost,
    UnitProcess,
    check_gpus,
    device_environment,
    usable_gpus,
)
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


NAMED = {"CUDA_VISIBLE_DEVICES": "3,GPU-8f,5,MIG-1/2/0,7"}


def test_each_unit_sees_gpus_of_its_own():
    """Of those that the server may use, in their order."""
    units = [(ParallelConfig(gpu=2), 0), (ParallelConfig(gpu=2), 2), (ParallelConfig(), 4)]
    seen = [device_environment(parallel, first, NAMED) for parallel, first in units]
    assert [list(variables) for variables in seen] == [["CUDA_VISIBLE_DEVICES"]] * 3
    names = [variables["CUDA_VISIBLE_DEVICES"] for variables in seen]
    assert names == ["3,GPU-8f", "5,MIG-1/2/0", "7"]


def test_simulated_devices_are_the_units_own():
    parallel = ParallelConfig(node=2, gpu=2, simulated_devices=4)
    before = NAMED | {"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=8"}
    assert device_environment(parallel, 2, before) == {
        "XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, ["0", "1"]),
        ({"JAX_PLATFORMS": ""}, ["0", "1"]),
        ({"JAX_PLATFORMS": "cuda,cpu"}, ["0", "1"]),
        ({"JAX_PLATFORMS": "cpu"}, []),
        (NAMED | {"JAX_PLATFORMS": "cpu"}, []),
        (NAMED | {"JAX_PLATFORMS": "gpu"}, ["3", "GPU-8f", "5", "MIG-1/2/0", "7"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "2,-1,3"}, ["2"]),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, []),
    ],
    ids=str,
)
def test_usable_gpus_are_those_that_jax_and_cuda_would_take(tmp_path, environment, names):
    for name in ("nvidia0", "nvidia5", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert usable_gpus(environment, tmp_path) == names


def test_a_unit_without_gpus_changes_nothing(tmp_path):
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    assert usable_gpus({}, tmp_path) == []
    assert device_environment(ParallelConfig(gpu=2), 0, hidden) == {}
    check_gpus(2, hidden)


def test_too_few_gpus_are_said_with_how_many_all_units_need(assert_refused):
    check_gpus(5, NAMED)
    name, rule = "GPUs of this server", "at least 6, one for each device of all prefill and decode"
    assert_refused(lambda: check_gpus(6, NAMED), name, 5, rule)
