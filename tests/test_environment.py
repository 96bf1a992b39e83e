"""Huge pages are asked for once, where the kernel has them and nobody else has decided."""

import os
import subprocess
import sys

import pytest

from dsv3_jax.environment import GLIBC_TUNABLES, allocator_settings

ASKED = {"GLIBC_TUNABLES": GLIBC_TUNABLES}


@pytest.mark.parametrize(
    ("offered", "environment", "expected"),
    [
        ("always [madvise] never", {}, ASKED),
        ("[always] madvise never", {"HOME": "/"}, ASKED),
        ("always madvise [never]", {}, {}),
        ("always [madvise] never", {"GLIBC_TUNABLES": ""}, {}),
        (None, {}, {}),
    ],
)
def test_settings(tmp_path, offered, environment, expected):
    huge_pages = tmp_path / "enabled"
    if offered is not None:
        huge_pages.write_text(offered + "\n")
    assert allocator_settings(environment, huge_pages) == expected


RESTARTED = """
import os, sys
from pathlib import Path
from dsv3_jax import environment

environment.HUGE_PAGES = Path(sys.argv[1])
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[2:], flush=True)
environment.restart_with_huge_pages()
print("here")
"""


def test_the_command_starts_again_once_as_it_was(tmp_path):
    huge_pages = tmp_path / "enabled"
    huge_pages.write_text("[always] madvise never\n")
    inherited = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-I", "-c", RESTARTED, str(huge_pages), "a b", "--flag"]
    run = subprocess.run(command, env=inherited, capture_output=True, text=True, check=True)
    first, second, third = run.stdout.splitlines()
    pid = first.split()[0]
    assert first == f"{pid} None ['a b', '--flag']"
    assert second == f"{pid} {GLIBC_TUNABLES} ['a b', '--flag']"
    assert third == "here"
