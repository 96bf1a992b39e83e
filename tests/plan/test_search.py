"""The search: against trying everything, and what it says of what falls out."""

from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.config import ParallelConfig, read_config
from dsv3_jax.plan.cluster import find_cluster
from dsv3_jax.plan.search import _candidate, _layouts, layout_name, search, search_table
from dsv3_jax.plan.train_plan import predict_training

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def small():
    config = read_config(CONFIGS / "v2_lite_16b.py")
    few = replace(config.train, batch_size=16, accumulation=4)
    parallel = replace(config.parallel, gpu=4)
    node = replace(find_cluster("h800_node"), gpus_per_node=4, nics_per_node=4, planes=4)
    return replace(config, parallel=parallel, train=few), node


@pytest.mark.slow
def test_it_finds_what_trying_everything_finds(small):
    config, cluster = small
    steps = {}
    for fields, keeps in _layouts(config, cluster):
        try:
            parallel = ParallelConfig(**fields)
            candidate = _candidate(config, cluster, parallel, keeps)
        except ValueError:
            continue
        plan, _ = predict_training(candidate.config, cluster)
        assert candidate.estimate_seconds <= plan.step_seconds  # a lower bound
        if plan.fits:
            name = layout_name(parallel)
            steps[name] = min(steps.get(name, plan.step_seconds), plan.step_seconds)
    found = search(config, cluster, top=3)
    best = sorted(steps.values())[:3]
    assert [plan.step_seconds for _, plan in found.best] == best
    assert all(plan.fits for _, plan in found.best)


def test_reasons_and_the_run_s_own_layout(small):
    found = search(*small, top=50)
    assert found.own in {layout_name(c.config.parallel) for c, _ in found.best}
    text = search_table(found).as_text()
    assert f"The run's own layout, {found.own}, is number" in text
    tight = replace(small[1], gpu=replace(small[1].gpu, memory_bytes=60_000_000_000))
    fewer = search(small[0], tight, top=50)
    assert fewer.fitting < found.fitting
    assert any(reason.startswith("memory") for reason in fewer.fell_out)
    assert any("too much by" in example for example in fewer.examples.values())
    none = replace(small[1], gpu=replace(small[1].gpu, memory_bytes=1_000_000_000))
    with pytest.raises(ValueError, match=r"cluster h800_node is .*, expected a layout that fits"):
        search(small[0], none)


def test_a_cluster_whose_gpus_are_no_power_of_two(small):
    """Three GPUs: what DualPipe does not have falls out, and is no error."""
    config, node = small
    few = replace(config, train=replace(config.train, batch_size=12, accumulation=3))
    found = search(few, replace(node, gpus_per_node=3, nics_per_node=3, planes=1), top=1)
    assert found.best
    assert any(reason.startswith("parallel.pipe") for reason in found.fell_out)


@pytest.mark.slow
def test_the_published_layout_is_among_the_best():
    """PP16, EP64, DualPipe: behind its own V form and behind EP32, which sends to fewer nodes."""
    found = search(read_config(CONFIGS / "v3_671b.py"), find_cluster("h800_2048"), top=4)
    names = [layout_name(candidate.config.parallel) for candidate, _ in found.best]
    assert "PP16 EP64 DP2 dualpipe" in names
    best, own = found.best[0], found.best[names.index("PP16 EP64 DP2 dualpipe")]
    assert own[1].step_seconds < 1.03 * best[1].step_seconds
    assert best[0].nodes_per_token < own[0].nodes_per_token
