"""Which implementation of an op runs, for all ops."""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import jax

from dsv3_kernels.target import device_kind, is_hopper

PLAIN = "DSV3_KERNELS"
"""An environment variable: set to `plain`, no kernel is chosen. To see what they change."""

_log = logging.getLogger("dsv3_kernels")


def require_known(implementation: str | None, known: tuple[str, ...]) -> None:
    """ValueError for a name that the op does not have."""
    if implementation not in (None, *known):
        expected = ", ".join(known)
        raise ValueError(f"implementation is {implementation!r}, expected one of {expected}")


def run(
    op: str,
    implementation: str | None,
    operands: tuple[Any, ...],
    *,
    kernel: Callable[[], Callable[..., Any]],
    unsupported: Callable[[], str],
    plain: Callable[..., Any],
    plain_name: str = "reference",
) -> Any:
    """Of `operands`, what the Mosaic kernel makes (`mosaic`) or `plain` does (any other name).

    None takes the kernel where the program is for Hopper and `unsupported` has no reason against
    it, once it is lowered for CUDA; and says so once in a process for each op and reason, to the
    logger `dsv3_kernels`: as information, or where a Hopper GPU has to do without as a warning.
    """
    if implementation == "mosaic":
        return kernel()(*operands)
    if implementation is not None or not _takes_kernel(op, unsupported, plain_name):
        return plain(*operands)
    return jax.lax.platform_dependent(*operands, cuda=kernel(), default=plain)


def _takes_kernel(op: str, unsupported: Callable[[], str], plain_name: str) -> bool:
    if not is_hopper():
        _say(logging.INFO, f"{op}: {plain_name}, for the program is for {device_kind()}")
        return False
    if (asked := os.environ.get(PLAIN, "")) not in ("", "plain"):
        raise ValueError(f"{PLAIN} is {asked!r} in the environment, expected plain or nothing")
    if asked:
        _say(logging.WARNING, f"{op}: {plain_name}, for {PLAIN} is plain")
        return False
    if reason := unsupported():
        _say(logging.WARNING, f"{op}: {plain_name}, for the Hopper kernel lacks this: {reason}")
        return False
    _say(logging.INFO, f"{op}: mosaic, for the program is for {device_kind()}")
    return True


@functools.cache
def _say(level: int, line: str) -> None:
    _log.log(level, line)
