"""Several processes as one run: found, joined, told apart, and ended together."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax.config.checks import require

HEARTBEAT_SECONDS = 30
"""A process that is not heard of for so long counts as lost, and the others end."""
JOIN_SECONDS = 300


def process_group(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    environment: Mapping[str, str],
) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`; None for a process on its own.

    Given explicitly, or found in the environment of a Slurm step (`srun`) or of Open MPI's
    `mpirun`, from which JAX reads the rest. Raises ValueError for a part of the explicit three, and
    for numbers that do not go together.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        assert processes is not None and process is not None and coordinator is not None
        host, colon, port = coordinator.rpartition(":")
        require(
            bool(host and colon and port.isdecimal()), "--coordinator", coordinator, "HOST:PORT"
        )
        require(processes >= 1, "--processes", processes, "at least 1")
        require(0 <= process < processes, "--process", process, f"0 to {processes - 1}")
        return {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
        }
    if len(missing) < 3:
        raise ValueError(f"{missing[0]} is missing, expected all of {', '.join(given)} or none")
    for variable, method in (("SLURM_STEP_NUM_TASKS", "slurm"), ("OMPI_COMM_WORLD_SIZE", "ompi")):
        if int(environment.get(variable, "1")) > 1:
            return {"cluster_detection_method": method}
    return None


def join(group: dict[str, Any] | None) -> None:
    """Joins the others; before JAX is used. Raises ValueError where they do not come together."""
    if group is None:
        return
    try:
        jax.distributed.initialize(
            **group,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            initialization_timeout=JOIN_SECONDS,
        )
    except RuntimeError as error:
        raise ValueError(f"the processes did not come together: {error}") from error


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process, the same answer in all."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


@contextmanager
def ending_together() -> Iterator[None]:
    """Ends this process at once, exit code 1, when work with others fails: a peer is lost.

    Nothing is left to be agreed on then; waiting for the others at exit would take minutes.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        _end(error)


def _end(error: Exception) -> NoReturn:
    text = " ".join(str(error).split())[:300]
    print(
        f"dsv3 train: process {jax.process_index()} of {jax.process_count()} ends, work with the"
        f" others failed, one of them may be lost: {text}; start all again, they go on from the"
        " last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
