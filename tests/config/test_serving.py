"""The serve section: what is refused, and the sizes that follow from it."""

import pytest

from dsv3_jax.config import ModelConfig, ParallelConfig, ServeConfig, ServerConfig


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
        ("redundant_experts", -1, "a number of at least 0"),
        ("rebalance_seconds", 0.0, "None or a positive number"),
        ("prefill_mesh", (1, 2), "None or the sizes of data, node and gpu"),
        ("unit", "both", "one of prefill, decode"),
        ("unit_processes", False, "True where serve.disaggregated is False"),
    ],
)
def test_refuses(assert_refused, name, value, rule):
    assert_refused(lambda: ServeConfig(**{name: value}), f"serve.{name}", value, rule)


@pytest.mark.parametrize("name", ["prefill_units", "decode_units"])
def test_one_process_has_one_unit_of_each_kind(assert_refused, name):
    one = {"disaggregated": True, "unit_processes": False}
    assert not ServeConfig(**one).unit_processes
    rule = "1 where serve.unit_processes is False"
    assert_refused(lambda: ServeConfig(**one, **{name: 2}), f"serve.{name}", 2, rule)
    assert getattr(ServeConfig(disaggregated=True, **{name: 2}), name) == 2


def test_pages_are_enough_for_all_slots_unless_they_are_given():
    assert ServeConfig(slots=3, page_size=64).num_pages(1000) == 3 * 16
    assert ServeConfig(slots=3, page_size=64, max_seq_len=65).num_pages(1000) == 3 * 2
    assert ServeConfig(slots=3, pages=7).num_pages(1000) == 7


def test_a_servers_mesh_divides_experts_with_the_redundant_ones():
    model = ModelConfig(n_routed_experts=12, n_group=1, topk_group=1)

    def check(parallel: ParallelConfig, **serve):
        ServerConfig(serve=ServeConfig(**serve), parallel=parallel).check_model(model)

    check(ParallelConfig(node=2, gpu=2))
    check(ParallelConfig(gpu=8, data=5), redundant_experts=4)
    rule = (
        r"n_routed_experts \+ serve\.redundant_experts is 13, expected a multiple of node x gpu = 4"
    )
    with pytest.raises(ValueError, match=rule):
        check(ParallelConfig(node=2, gpu=2), redundant_experts=1)
    with pytest.raises(ValueError, match="is 12, expected a multiple of node x gpu = 5"):
        check(ParallelConfig(), disaggregated=True, prefill_mesh=(1, 1, 5))


def test_a_prefill_units_mesh():
    parallel = ParallelConfig(node=2, gpu=2, dispatcher="flat", simulated_devices=4)
    serve = ServeConfig(disaggregated=True, prefill_mesh=(1, 1, 2))
    prefill = ServerConfig(serve=serve, parallel=parallel).prefill_parallel
    assert prefill.mesh_shape == (1, 1, 1, 2) and prefill.dispatcher == "flat"
    assert prefill.simulated_devices == 2
    same = ServerConfig(serve=ServeConfig(disaggregated=True), parallel=parallel)
    assert same.prefill_parallel == parallel
