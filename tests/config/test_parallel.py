"""The parallel section: this release runs one device and says so."""

import pytest

from dsv3_jax.config import ParallelConfig


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        *[(axis, 0, "a number of at least 1") for axis in ("pipe", "data", "node", "gpu")],
        *[(axis, 2, "1 (this release trains") for axis in ("pipe", "data", "node", "gpu")],
        ("micro_batches", 0, "a number of at least 1"),
        ("schedule", "dualpipe", "none (this release has no pipeline)"),
        ("simulated_devices", 8, "0 or 1 (this release trains on one device)"),
        ("simulated_devices", -1, "0 or 1 (this release trains on one device)"),
        ("zero", 2, "1 or 3"),
    ],
)
def test_refuses(assert_refused, name, value, rule):
    assert_refused(lambda: ParallelConfig(**{name: value}), f"parallel.{name}", value, rule)


def test_accepts_one_device():
    assert ParallelConfig(zero=3, simulated_devices=1, micro_batches=4).zero == 3
