"""Which implementation runs, and what is said of it."""

import logging

import jax.numpy as jnp
import pytest
from jax.sharding import use_abstract_mesh

from dsv3_kernels import choice
from tests.kernels.test_target import mesh_of


def run(implementation=None, reason="", op="op", kind=None) -> str:
    """Which of two functions was taken, for a CPU or for a GPU of this kind."""

    def by_name(name):
        return lambda x: x + {"kernel": 1, "plain": 2}[name]

    def taken():
        found = choice.run(
            op,
            implementation,
            (jnp.float32(0),),
            kernel=lambda: by_name("kernel"),
            unsupported=lambda: reason,
            plain=by_name("plain"),
        )
        return {1.0: "kernel", 2.0: "plain"}[float(found)]

    if kind is None:
        return taken()
    with use_abstract_mesh(mesh_of(kind)):
        return taken()


def lines(caplog) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage()) for record in caplog.records]


@pytest.fixture(autouse=True)
def forgotten():
    """What has been said is said again."""
    choice._say.cache_clear()


def test_one_line_says_what_was_chosen_and_why(caplog):
    caplog.set_level(logging.INFO, "dsv3_kernels")
    assert [run(), run(), run(op="other")] == ["plain"] * 3
    assert lines(caplog) == [
        (logging.INFO, "op: reference, for the program is for cpu"),
        (logging.INFO, "other: reference, for the program is for cpu"),
    ]


def test_a_hopper_without_its_kernel_is_warned_of(caplog):
    caplog.set_level(logging.INFO, "dsv3_kernels")
    assert run(reason="k is 3, expected 4", kind="NVIDIA H800") == "plain"
    expected = "op: reference, for the Hopper kernel lacks this: k is 3, expected 4"
    assert lines(caplog) == [(logging.WARNING, expected)]


def test_on_a_hopper_the_kernel_is_taken_where_it_is_lowered_for_cuda(caplog):
    caplog.set_level(logging.INFO, "dsv3_kernels")
    assert run(kind="NVIDIA H800") == "plain"  # lowered for this CPU in the end
    assert lines(caplog) == [(logging.INFO, "op: mosaic, for the program is for NVIDIA H800")]


def test_kernels_may_be_left_out(caplog, monkeypatch):
    monkeypatch.setenv("DSV3_KERNELS", "plain")
    assert run(kind="NVIDIA H800") == "plain"
    assert lines(caplog) == [(logging.WARNING, "op: reference, for DSV3_KERNELS is plain")]
    monkeypatch.setenv("DSV3_KERNELS", "none")
    with pytest.raises(ValueError, match="DSV3_KERNELS is 'none' in the environment, expected pl"):
        run(kind="NVIDIA H800")


def test_a_named_one_never_falls_back(caplog):
    caplog.set_level(logging.INFO, "dsv3_kernels")
    assert run("mosaic", reason="anything") == "kernel"  # which raises NotImplementedError itself
    assert run("reference", kind="NVIDIA H800") == "plain"
    assert not caplog.records
    with pytest.raises(ValueError, match="implementation is 'fast', expected one of a, b"):
        choice.require_known("fast", ("a", "b"))
