"""The Hopper kernels at the model's shapes: read as compiled, where there is no GPU, or timed."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from dsv3_kernels.bench import PEAK, Case, StaticReport, all_cases, compiled, timed
from dsv3_kernels.published import Comparison, comparisons
from dsv3_kernels.sass import Kernel
from dsv3_kernels.target import is_hopper

DEVICE = "NVIDIA H800, not there: predicted"
BEGIN, END = "<!-- begin: dsv3 bench kernels -->", "<!-- end -->"
"""Around what is generated in kernels/README.md."""
TMA = ("UTMALDG", "UTMASTG", "UBLKCP")
MMA = ("QGMMA", "HGMMA")


def bench_static(op: str | None, *, as_json: bool, readme: Path | None) -> None:
    """Prints what every case compiles to and predicts, and writes the table of all into `readme`.

    ValueError for an unknown op, or a file without the two lines between which the table stands.
    """
    if readme is not None:
        if op is not None:
            raise ValueError(f"--op is {op!r}, expected none with --write: the table is of all")
        around_table(readme)  # before anything is compiled
    reports = []
    for case in all_cases(op):
        reports.append(compiled(case))
        if not as_json:
            print(_line(reports[-1]), flush=True)
    if as_json:
        print(json.dumps({"what": "kernels", "device": DEVICE, "kernels": as_objects(reports)}))
    if readme is not None:
        write_table(readme, markdown(reports, comparisons()))


def write_table(readme: Path, lines: Iterable[str]) -> None:
    """Puts `lines` between the marks, into a new file that takes the old one's place."""
    before, after = around_table(readme)
    new = readme.with_name(f".{readme.name}.new")
    try:
        new.write_text("\n".join([before + BEGIN, *lines, END + after]))
        os.replace(new, readme)
    finally:
        new.unlink(missing_ok=True)


def bench_timed(op: str | None, repeats: int, *, as_json: bool) -> None:
    """Prints how long every case takes. ValueError where there is no Hopper GPU."""
    kind = jax.devices()[0].device_kind
    if not is_hopper():
        raise ValueError(f"the device is {kind}, expected a Hopper GPU, or --static without one")
    found = []
    for case in all_cases(op):
        seconds = timed(case, repeats)
        share = case.work / seconds / PEAK[case.unit]
        found.append({**_case(case), "microseconds": 1e6 * seconds, "share": share})
        if not as_json:
            speed = f"{1e6 * seconds:9.1f} us  {share:6.1%} of {case.unit}"
            print(f"{case.op:16} {case.name:44} {speed}", flush=True)
    if as_json:
        print(json.dumps({"what": "kernels", "device": kind, "kernels": found}))


def as_objects(reports: Iterable[StaticReport]) -> list[dict[str, Any]]:
    """What `--static --json` says of each case."""
    return [
        {
            **_case(report.case),
            "share": report.share,
            "shares": report.shares,
            "microseconds": report.microseconds,
            "compiled": [_kernel(kernel) for kernel in report.kernels],
        }
        for report in reports
    ]


def _case(case: Case) -> dict[str, Any]:
    return {"op": case.op, "case": case.name, "unit": case.unit, "work": case.work}


def _kernel(kernel: Kernel) -> dict[str, Any]:
    loop = kernel.main_loop
    return {
        "registers": kernel.registers,
        "spilled_bytes": kernel.spilled_bytes,
        "shared_memory_bytes": kernel.shared_memory_bytes,
        "instructions": dict(kernel.instructions),
        "main_loop": None
        if loop is None
        else {
            "tensor_cycles": loop.tensor_cycles,
            "issue_slots": sum(loop.instructions.values()),
            "operand_bytes": loop.operand_bytes,
            "instructions": dict(loop.instructions),
        },
    }


def _line(report: StaticReport) -> str:
    unit = "HBM's bandwidth" if report.case.unit == "memory" else f"{report.case.unit} peak"
    kernels = "; ".join(
        f"{kernel.registers} registers, {kernel.spilled_bytes} bytes spilled,"
        f" {kernel.shared_memory_bytes / 1024:.0f} KB shared,"
        f" {_count(kernel, MMA)} MMAs, {_count(kernel, TMA)} TMA{_loop(kernel)}"
        for kernel in report.kernels
    )
    return (
        f"{report.case.op:16} {report.case.name:44} {report.share:6.1%} of {unit} ({report.limit}),"
        f" {report.microseconds:,.1f} us predicted\n    {kernels}"
    )


def _count(kernel: Kernel, names: tuple[str, ...]) -> int:
    return sum(kernel.instructions.get(name, 0) for name in names)


def _loop(kernel: Kernel) -> str:
    """Of the main loop: cycles of the tensor core, and of a warp to issue all."""
    if (loop := kernel.main_loop) is None:
        return ""
    issued = sum(loop.instructions.values())
    return f"; loop: {loop.tensor_cycles:.0f} tensor cycles, {issued} issued"


def markdown(reports: list[StaticReport], published: list[Comparison]) -> Iterator[str]:
    """The lines between the marks of kernels/README.md."""
    yield "| op | case | predicted | of | limit | registers | spilled | shared | MMA | TMA | loop |"
    yield "|---|---|---:|---|---|---:|---:|---:|---:|---:|---|"
    yield from (_row(report) for report in reports)
    yield ""
    yield "| work | measured of theirs | predicted of ours | apart |"
    yield "|---|---:|---:|---:|"
    for found in published:
        measured, predicted = f"{found.measured:.1%}", f"{found.predicted:.1%}"
        yield f"| {found.what} | {measured} | {predicted} | {found.error:+.0%} |"


def _row(report: StaticReport) -> str:
    def of_each(value: Callable[[Kernel], object]) -> str:
        return " + ".join(str(value(kernel)) for kernel in report.kernels)

    def loop(kernel: Kernel) -> str:
        if kernel.main_loop is None:
            return "-"
        issued = sum(kernel.main_loop.instructions.values())
        return f"{kernel.main_loop.tensor_cycles:.0f} : {issued}"

    case = report.case
    cells = (
        case.op,
        case.name,
        f"{report.share:.1%}",
        "HBM" if case.unit == "memory" else case.unit.upper(),
        report.limit,
        of_each(lambda kernel: kernel.registers),
        of_each(lambda kernel: kernel.spilled_bytes),
        of_each(lambda kernel: f"{kernel.shared_memory_bytes / 1024:.0f} KB"),
        of_each(lambda kernel: _count(kernel, MMA)),
        of_each(lambda kernel: _count(kernel, TMA)),
        of_each(loop),
    )
    return f"| {' | '.join(cells)} |"


def around_table(readme: Path) -> tuple[str, str]:
    """What stands before and after the marks. ValueError where they are not there once."""
    text = readme.read_text()
    if text.count(BEGIN) != 1 or END not in text.partition(BEGIN)[2]:
        raise ValueError(f"{readme} has no lines {BEGIN!r} and {END!r}, expected one of each")
    before, _, rest = text.partition(BEGIN)
    return before, rest.partition(END)[2]
