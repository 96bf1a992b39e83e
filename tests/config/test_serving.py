"""The serve section: what is refused, and the sizes that follow from it."""

import pytest

from dsv3_jax.config import ServeConfig


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        *[(n, 0, "a number of at least 1") for n in ("slots", "prefill_chunk", "decode_steps")],
        ("page_size", 12, "a multiple of 8"),
        ("pages", 0, "None or at least 1"),
        ("max_seq_len", 0, "None or at least 1"),
        ("cache_dtype", "int8", "one of fp32, bf16, fp8"),
        ("dtype", "float64", "one of float32, bfloat16"),
        ("slo_ttft_seconds", 0.0, "None or a positive number"),
        ("max_queue", -1, "a number of at least 0"),
        ("deadline_seconds", 0.0, "over 0"),
    ],
)
def test_refuses(assert_refused, name, value, rule):
    assert_refused(lambda: ServeConfig(**{name: value}), f"serve.{name}", value, rule)


def test_pages_are_enough_for_all_slots_unless_they_are_given():
    assert ServeConfig(slots=3, page_size=64).num_pages(1000) == 3 * 16
    assert ServeConfig(slots=3, page_size=64, max_seq_len=65).num_pages(1000) == 3 * 2
    assert ServeConfig(slots=3, pages=7).num_pages(1000) == 7
