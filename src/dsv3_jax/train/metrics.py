"""What a run says while it trains: metrics.jsonl, TensorBoard events, a progress display.

`metrics.jsonl` holds one JSON object a line. A training step writes `step tokens_seen loss
main_loss mtp_loss balance_loss grad_norm learning_rate tokens_per_second step_seconds
expert_load_max_over_mean`, and every so often `expert_load` and `router_bias`, both
[routed layers][experts] (tokens of that step's batch; the bias after it). An evaluation adds
`eval_loss` and `eval_bits_per_byte` to its step's object or writes an object of its own; with FP8
also `fp8/PRODUCT/OPERAND/STATISTIC`, PRODUCT by its layer's attribute, OPERAND one of input, weight
and gradient, STATISTIC one of underflow, saturation, log2_scale_mean and log2_scale_std.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from tensorboardX import SummaryWriter

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsWriter(contextlib.AbstractContextManager):
    """Appends to `run_dir`/metrics.jsonl, a line at once, and to `run_dir`/tensorboard.

    A run that goes on after `resume_step` drops what was written later, and a half-written last
    line; `None` begins the file anew. Numbers keep every digit: a float reads back to the same
    bits. JSON has no NaN, so those are the strings "nan", "inf", "-inf", which `float` and
    `read_metrics` understand.
    """

    def __init__(self, run_dir: Path, resume_step: int | None):
        last_step = -1 if resume_step is None else resume_step
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        _drop_after(path, last_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        self._events = SummaryWriter(
            str(run_dir / "tensorboard"),
            purge_step=last_step + 1,
            flush_secs=10,
            filename_suffix=f".{time.time_ns()}",  # its names are the same within a second
        )

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, metrics: dict[str, Any]) -> None:
        """Appends one object. Values are numbers or arrays; `step` is required.

        Raises ValueError for other values.
        """
        if "step" not in metrics:
            raise ValueError(f"metrics are {sorted(metrics)}, expected a step among them")
        plain = {key: _to_json(key, np.asarray(value).tolist()) for key, value in metrics.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()
        for key, value in plain.items():
            if key != "step" and isinstance(value, int | float):
                self._events.add_scalar(key, value, plain["step"])

    def close(self) -> None:
        self._file.close()
        self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, in order; a half-written last line is left out.

    Raises ValueError naming any other line that is not a JSON object.
    """
    objects = []
    for number, line, complete in _lines(path):
        parsed = _parse(line) if complete else None
        if parsed is not None:
            objects.append(parsed)
        elif complete:
            raise ValueError(f"{path} line {number} is {line[:80]!r}, expected a JSON object")
    return objects


class ProgressDisplay(contextlib.AbstractContextManager):
    """A bar with step, loss, tokens/s and time left; where output is no terminal, a plain line
    at the first step, at the last and every `plain_every_seconds` between."""

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 1,
        plain_every_seconds: float = 10.0,
        console: Console | None = None,
    ):
        self._console = console or Console(highlight=False)
        self._total_steps = total_steps
        self._recent: deque[tuple[float, int]] = deque(maxlen=50)
        self._plain_every_seconds = plain_every_seconds
        self._next_plain_seconds = -math.inf
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task(
                "train", total=total_steps, completed=first_step - 1, text="compiling"
            )

    def __enter__(self) -> "ProgressDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows that `step` is done. Calls of skipped steps may be left out."""
        now = time.monotonic()
        self._recent.append((now, step))
        left = f"{_clock(self._seconds_left())} left"
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {left}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif now >= self._next_plain_seconds or step >= self._total_steps:
            self._next_plain_seconds = now + self._plain_every_seconds
            self.message(f"step {step}/{self._total_steps}  {text}")

    def message(self, text: str) -> None:
        """Prints one line, above the bar where there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _seconds_left(self) -> float | None:
        (then, first), (now, last) = self._recent[0], self._recent[-1]
        if last == first:
            return None
        return (now - then) / (last - first) * (self._total_steps - last)


def _clock(seconds: float | None) -> str:
    """`4:05`, `1:02:09`, or `-:--` where it is not known yet."""
    if seconds is None:
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _drop_after(path: Path, last_step: int) -> None:
    """Rewrites the file with the objects up to `last_step`, whole or not at all."""
    kept = []
    for number, line, complete in _lines(path):
        parsed = _parse(line) if complete else None
        if parsed is None or "step" not in parsed:
            logger.warning("%s: line %d dropped, it is not a step's JSON object", path, number)
        elif parsed["step"] <= last_step:
            kept.append(line + "\n")
    rewritten = path.with_name(path.name + ".tmp")
    with open(rewritten, "w", encoding="utf-8") as out:
        out.writelines(kept)
        out.flush()
        os.fsync(out.fileno())
    os.replace(rewritten, path)


def _lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(number from 1, text, whether the line's end was written)."""
    if not path.exists():
        return
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if line:
            yield number, line, number < len(lines)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except json.JSONDecodeError:
        return None
    return {k: _from_json(v) for k, v in parsed.items()} if isinstance(parsed, dict) else None


def _to_json(key: str, value: Any) -> Any:
    match value:
        case list():
            return [_to_json(key, item) for item in value]
        case float() if not math.isfinite(value):
            return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
        case bool() | int() | float():
            return value
    raise ValueError(f"metric {key} is {value!r}, expected a number or an array of numbers")


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
