"""A directory that appears whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def require_new(target: Path) -> None:
    """Raises ValueError where `target` exists and is anything but an empty directory."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists, expected a new or an empty directory to write to")


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A hidden directory beside `target` to write into, renamed to it at the end of the block.

    An exception in the block removes it. Raises ValueError as `require_new` does, and OSError that
    names `target` where the disk is full or not writable.
    """
    target = target.absolute()
    require_new(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{target} was not written, nothing is left of it: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
