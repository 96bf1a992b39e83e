"""What has to be decided before the process loads JAX."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from dsv3_jax.config.parallel import simulated_devices

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
GLIBC_TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",  # ask for huge pages
        "glibc.malloc.mmap_threshold=33554432",  # keep what is smaller, with
        "glibc.malloc.trim_threshold=4294967296",  # up to 4 GiB of it freed
    )
)


def restart_with_huge_pages() -> None:
    """Starts this command anew, in this process, with glibc told to use huge pages.

    XLA's CPU backend allocates a step's memory anew in every step, and touching it page by page
    cost a third of the time of a training step (docs/LOG.md, 2026-11-23). glibc reads the setting
    only when a process starts. Does nothing where `allocator_settings` says so.
    """
    settings = allocator_settings(os.environ, HUGE_PAGES)
    if settings:
        sys.stdout.flush()
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, os.environ | settings)


def allocator_settings(environment: Mapping[str, str], huge_pages: Path) -> dict[str, str]:
    """Environment variables to add: none where GLIBC_TUNABLES is set, be it to nothing, nor where
    the kernel (its file `huge_pages`) has no huge pages to give."""
    if "GLIBC_TUNABLES" in environment or not huge_pages.is_file():
        return {}
    never = "[never]" in huge_pages.read_text()
    return {} if never else {"GLIBC_TUNABLES": GLIBC_TUNABLES}


def simulate_devices(count: int) -> None:
    """Makes JAX, when it loads, see `count` CPU devices and no others; 0 changes nothing."""
    if count:
        os.environ |= simulated_devices(count, os.environ)
