"""The coordinator's side of a unit: starts its process, hears it, and starts it again."""

import itertools
import logging
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from dsv3_jax.config.checks import require
from dsv3_jax.config.parallel import ParallelConfig, simulated_devices
from dsv3_jax.serve.disaggregated.messages import Beat, Ready, Refused, Start

START_SECONDS = 180
"""Without a sign of life from a unit that loads and compiles."""
SILENCE_SECONDS = 5
"""And from one that is ready, which says every second that it lives."""
STEP_SECONDS = 60
"""Of one step of an engine, after which it counts as hung."""
STOP_SECONDS = 5
BACK_OFF_SECONDS = 0.5
"""Before the first restart; doubled with each start that fails."""
MOST_BACK_OFF_SECONDS = 30
MOST_FAILED_STARTS = 5
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
GPU_NAME = re.compile(r"\d+|(GPU|MIG)-.+")
MODULE = "dsv3_jax.serve.disaggregated.unit"
_log = logging.getLogger("dsv3_jax.serve")


@dataclass(frozen=True)
class Lost:
    """The process has ended; another one is started."""

    reason: str


@dataclass(frozen=True)
class GivenUp:
    """It is not started any more."""

    reason: str


@dataclass(frozen=True)
class _Life:
    was_ready: bool
    was_refused: bool
    """It said itself why it cannot run."""
    end: str


class UnitProcess:
    """Keeps one unit alive. `heard` gets its messages, `Lost` and `GivenUp`, in a thread."""

    def __init__(self, start: Start, heard: Callable[[str, Any], None]):
        self.name, self.kind = start.name, start.kind
        self._start = pickle.dumps(start)
        self._devices = device_environment(start.server.parallel, start.first_device, os.environ)
        self._heard = heard
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name=start.name, daemon=True)

    @property
    def pid(self) -> int | None:
        """Of its process, None where there is none."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Returns at once."""
        self._keeper.start()

    def send(self, message: Any) -> None:
        """Returns at once; nothing happens where the unit has ended."""
        self._outbox.put(message)

    def stop(self) -> None:
        """Ends the process, and waits for that."""
        with self._lock:
            self._stopped.set()
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._keeper.is_alive():
            self._keeper.join()

    def _keep(self) -> None:
        failures, was_ever_ready = 0, False
        while not self._stopped.is_set():
            life = self._live()
            if self._stopped.is_set():
                return
            was_ever_ready |= life.was_ready
            failures = 0 if life.was_ready else failures + 1
            if failures == MOST_FAILED_STARTS or (life.was_refused and not was_ever_ready):
                _log.error("%s %s; it is not started again", self.name, life.end)
                self._heard(self.name, GivenUp(life.end))
                return
            seconds = min(BACK_OFF_SECONDS * 2**failures, MOST_BACK_OFF_SECONDS)
            _log.warning("%s %s; it is started again in %s s", self.name, life.end, seconds)
            self._heard(self.name, Lost(life.end))
            self._stopped.wait(seconds)

    def _live(self) -> _Life:
        """One process, from its start to its end."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                process = _spawn(theirs.fileno(), self._devices)
            with self._lock:
                self._socket, self._process = ours, process
                if self._stopped.is_set():
                    ours.shutdown(socket.SHUT_RDWR)
            self._outbox = SimpleQueue()  # what was for the process before is void
            connection = Connection(os.dup(ours.fileno()))
            writing = [connection, self._outbox, self._start]
            writer = threading.Thread(target=_write, args=writing, daemon=True)
            writer.start()
            life = self._listen(connection, process)
            with self._lock:
                self._socket = self._process = None
            self._outbox.put(None)
            writer.join()
            connection.close()
        return life

    def _listen(self, connection: Connection, process: subprocess.Popen) -> _Life:
        """Hears a process until it ends, or ends it."""
        was_ready, refusal, end = False, None, None
        _limit_silence(connection, START_SECONDS)
        try:
            while end is None:
                match connection.recv():
                    case Refused(message):
                        refusal = message
                    case Beat(_, step_seconds) if step_seconds > STEP_SECONDS:
                        end = f"was stuck in a step for {step_seconds:.0f} s"
                    case message:
                        if isinstance(message, Ready):
                            was_ready = True
                            _limit_silence(connection, SILENCE_SECONDS)
                        self._heard(self.name, message)
        except BlockingIOError:
            end = "gave no sign of life"
        except (EOFError, OSError):
            pass
        if end is not None:
            process.kill()
        code = _exit_code(process)
        if refusal is not None:
            end = f"cannot run: {refusal}"
        if end is None:
            end = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return _Life(was_ready, refusal is not None, end)


def device_environment(
    parallel: ParallelConfig, first: int, environment: Mapping[str, str]
) -> dict[str, str]:
    """Variables for a unit that is to see simulated devices, or GPUs of its own: as many as it has
    in its mesh, from number `first` on of those that this process may use. None where it may use
    no GPU."""
    count = parallel.num_devices
    if parallel.simulated_devices:
        return simulated_devices(count, environment)
    mine = usable_gpus(environment)[first : first + count]
    return {VISIBLE_GPUS: ",".join(mine)} if mine else {}


def check_gpus(needed: int, environment: Mapping[str, str]) -> None:
    """ValueError where there are GPUs to use, but fewer than all units `needed` together."""
    found = len(usable_gpus(environment))
    rule = (
        f"at least {needed}, one for each device of all prefill and decode units"
        f" ({VISIBLE_GPUS} says which; JAX_PLATFORMS=cpu uses none)"
    )
    require(not 0 < found < needed, "GPUs of this server", found, rule)


def usable_gpus(environment: Mapping[str, str], machine: Path = Path("/dev")) -> list[str]:
    """Those that JAX in this environment would use, as CUDA names them; `machine` has a file of
    each GPU."""
    platforms = environment.get("JAX_PLATFORMS", "").split(",")
    if platforms != [""] and not {"cuda", "gpu"} & set(platforms):
        return []
    if VISIBLE_GPUS not in environment:
        return [str(number) for number, _ in enumerate(machine.glob("nvidia[0-9]*"))]
    # CUDA takes those before the first name that is none: "-1" or "" hide all of them.
    return list(itertools.takewhile(GPU_NAME.fullmatch, environment[VISIBLE_GPUS].split(",")))


def _spawn(file_descriptor: int, devices: dict[str, str]) -> subprocess.Popen:
    """A unit at one end of a socket pair. It imports what this process can."""
    path = os.pathsep.join(part or os.getcwd() for part in sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", MODULE, str(file_descriptor)],
        pass_fds=[file_descriptor],
        stdin=subprocess.DEVNULL,
        stdout=2,  # the server's standard output is for what it says itself
        env=os.environ | devices | {"PYTHONPATH": path},
    )


def _write(connection: Connection, outbox: SimpleQueue[Any], start: bytes) -> None:
    """Sends the start, then what is put into the outbox, to None or the other side's end."""
    try:
        connection.send_bytes(start)
        while (message := outbox.get()) is not None:
            connection.send(message)
    except OSError:
        return  # whoever listens notices as well


def _limit_silence(connection: Connection, seconds: int) -> None:
    """Makes a wait for a message, or the rest of one, end in BlockingIOError."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))


def _exit_code(process: subprocess.Popen) -> int:
    """Of a process that has closed its socket, and so is about to end."""
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
