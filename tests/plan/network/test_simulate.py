"""Exchanges against closed forms: M t, injection, a lost plane, hashes as balls in bins."""

import dataclasses
import time

import numpy as np
import pytest

from dsv3_jax.plan.network.fabric import Fabric
from dsv3_jax.plan.network.fat_tree import build_ft2
from dsv3_jax.plan.network.fluid import max_min_rates
from dsv3_jax.plan.network.simulate import PLACEMENTS, Scenario, simulate
from dsv3_jax.plan.network.transfers import Transfers

NIC, NVLINK = 40e9, 160e9  # an H800's, achieved


def run(topology: str, gpus: int, **fields):
    return simulate(Scenario(topology=topology, gpus=gpus, **fields)).report


def write_experts(tmp_path, experts: np.ndarray):
    np.save(tmp_path / "experts.npy", experts)
    return tmp_path / "experts.npy"


@pytest.mark.parametrize("distinct_nodes", [1, 2, 4, 8])
def test_a_dispatch_takes_as_long_as_its_distinct_nodes(tmp_path, distinct_nodes):
    """ "Insights" §4.3: M t for M distinct nodes, where t is all tokens once to one node.

    Every token goes to M other nodes (7 at most, as its own costs nothing): those that follow it.
    """
    tokens, others = 8, min(distinct_nodes, 7)
    sender = np.repeat(np.arange(64), tokens)
    node = (sender[:, None] // 8 + 1 + np.arange(8) % others) % 8
    expert = node * 32 + (np.arange(8) // others)[None, :] * 4
    report = run(
        "mpft",
        64,
        tokens=tokens,
        experts_file=write_experts(tmp_path, expert),
    )
    one_node = tokens * 7168 * (1 + 4 / 128) / NIC
    assert report.network_seconds == pytest.approx(others * one_node)


@pytest.mark.parametrize("routing", ["adaptive", "static", "ecmp"])
def test_all_to_all_is_the_same_on_planes_and_on_rails(routing):
    """The paper's Figures 5 and 6 on 128 GPUs: MPFT and MRFT equal; ours within 2 %."""
    planes, rails = (
        run(name, 128, traffic="alltoall", routing=routing) for name in ("mpft", "mrft")
    )
    assert planes.seconds == pytest.approx(rails.seconds, rel=0.02)
    # Neither is trivially so: with PXN a NIC sends for all 8 GPUs to 15 nodes' same index.
    bound = 2**30 / 128 * 8 * 15 / NIC
    assert planes.seconds == pytest.approx(bound)


@pytest.mark.parametrize(("topology", "gpus", "radix"), [("ft2", 128, 16), ("ft3", 64, 8)])
def test_all_to_all_on_a_non_blocking_tree_is_bound_by_injection(topology, gpus, radix):
    report = run(topology, gpus, radix=radix, traffic="alltoall")
    assert report.seconds == pytest.approx(2**30 / gpus * (gpus - 8) / NIC)
    assert report.bottleneck.startswith("NIC out of GPU 0 and")


@pytest.mark.parametrize("traffic", ["alltoall", "dispatch", "pipeline"])
def test_a_lost_plane_costs_an_eighth_and_no_transfer(traffic):
    fields = {"traffic": traffic, "tokens": 64, "seed": 1, "stages": 2, "tolerance": 0.01}
    whole = run("mpft", 64, **fields)
    lost = run("mpft", 64, failures=("plane=3",), **fields)
    assert lost.network_bytes == pytest.approx(whole.network_bytes)
    # What random tokens leave uneven between NICs, seven rails even out.
    rel = 0.03 if traffic == "dispatch" else 1e-6
    assert lost.network_seconds == pytest.approx(8 / 7 * whole.network_seconds, rel=rel)
    by_name = {layer.name: layer for layer in lost.layers}
    assert by_name["NIC out"].mean_use <= 7 / 8 + 1e-9


def test_a_failed_nic_slows_its_node_alone():
    whole = run("mpft", 128, traffic="pipeline", stages=2, tokens=64)
    lost = run("mpft", 128, traffic="pipeline", stages=2, tokens=64, failures=("nic=3",))
    assert lost.seconds == pytest.approx(8 / 7 * whole.seconds)


def test_a_failed_link_leaves_the_others():
    """One of a leaf's 8 uplinks lost, all of its traffic crosses: 8/7 for those who share it."""
    whole = run("ft2", 128, radix=16, traffic="pipeline", stages=2, tokens=64)
    lost = run("ft2", 128, radix=16, traffic="pipeline", stages=2, tokens=64, failures=("link=0",))
    assert lost.seconds == pytest.approx(8 / 7 * whole.seconds)
    assert lost.network_bytes == whole.network_bytes


def test_hashed_flows_are_balls_in_bins():
    """32 NICs of one leaf to 32 of another: a flow's spine is a bin, 32 (1 - (31/32)^32) are used.

    Each used spine passes one link's bandwidth on, however many flows are on it; static tables and
    spraying use all 32.
    """
    fabric = Fabric(
        build_ft2(2048),
        network_bytes_per_second=1.0,
        nvlink_bytes_per_second=4.0,
    )
    gpus = np.arange(32)
    pairs = Transfers(source=gpus, target=32 + gpus, size_bytes=np.ones(32))

    def total_rate(routing: str, seed: int = 0) -> float:
        flows = fabric.flows(pairs, routing=routing, seed=seed)
        return float(max_min_rates(flows, fabric.capacity).sum())

    rates = [total_rate("ecmp", seed) for seed in range(40)]
    expected = 32 * (1 - (31 / 32) ** 32)
    assert expected == pytest.approx(20.41, abs=0.01)
    error = np.std(rates) / np.sqrt(len(rates))
    assert np.mean(rates) == pytest.approx(expected, abs=4 * error)
    assert error < 0.3
    assert total_rate("static") == pytest.approx(32)
    assert total_rate("adaptive") == pytest.approx(32)


def test_a_ring_over_nodes_is_bound_by_its_nics():
    """V (n-1)/n / 8 a NIC, and 7/8 of V (n-1)/n over NVLink."""
    report = run("mpft", 64, traffic="reduce", payload_bytes=1e9)
    volume = 1e9 * 63 / 64
    assert report.network_seconds == pytest.approx(volume / 8 / NIC)
    assert report.nvlink_seconds == pytest.approx(volume * 7 / 8 / NVLINK)
    assert report.seconds == max(report.network_seconds, report.nvlink_seconds)


def test_a_pipeline_s_stages_send_to_their_neighbours():
    report = run("mpft", 128, traffic="pipeline", stages=8, tokens=64)
    assert report.network_seconds == pytest.approx(2 * 64 * 7168 * 2 / NIC)  # both neighbours'
    ends = run("mpft", 128, traffic="pipeline", stages=2, tokens=64)
    assert ends.network_seconds == pytest.approx(64 * 7168 * 2 / NIC)


def test_placement_does_not_matter_where_the_tree_does_not_block():
    """Sprayed on a non-blocking plane, nodes far apart are as good as neighbours."""
    packed, scattered = (
        run("mpft", 128, radix=16, tokens=16, placement=placement, seed=3)
        for placement in PLACEMENTS
    )
    assert packed.seconds == pytest.approx(scattered.seconds)
    for report, climbs in ((packed, False), (scattered, True)):
        layer = next(layer for layer in report.layers if layer.name == "leaf to spine")
        assert (layer.max_use > 0) == climbs


def test_the_report_adds_up():
    simulated = simulate(Scenario(topology="mrft", gpus=64, tokens=64))
    report, outcome = simulated.report, simulated.outcome
    assert report.seconds == max(report.network_seconds, report.nvlink_seconds)
    assert report.bound_seconds <= report.seconds * (1 + 1e-9)
    token_bytes = 7168 * (1 + 4 / 128)
    copies = report.logical_bytes_per_second * report.seconds / token_bytes / 64
    assert 3.9 < copies < 4  # nodes of a token: test_gate has the distribution
    out = simulated.fabric.link_of(0, np.arange(64))
    assert outcome.link_bytes[out].mean() == pytest.approx(report.network_bytes)
    assert sum(layer.links for layer in report.layers) == len(outcome.capacity)
    assert dataclasses.asdict(report)["layers"][0]["name"] == "NIC out"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topology": "torus"}, "topology is 'torus', expected one of ft2, ft3"),
        ({"gpus": 12}, "gpus is 12, expected a positive multiple of 8"),
        ({"ep": 48}, "ep is 48, expected a divisor of the 64 GPUs"),
        ({"traffic": "reduce", "group": 7}, "group is 7, expected a divisor of the 64 GPUs"),
        ({"traffic": "gossip"}, "traffic is 'gossip', expected one of dispatch"),
        ({"routing": "up"}, "routing is 'up', expected one of ecmp"),
        ({"placement": "loose"}, "placement is 'loose', expected one of packed"),
        ({"tokens": 0}, "tokens is 0, expected above 0"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
    ],
)
def test_scenarios_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        simulate(Scenario(**{"topology": "mpft", "gpus": 64} | fields))


def test_a_routing_file_that_is_none(tmp_path):
    path = write_experts(tmp_path, np.zeros((4, 2)))
    with pytest.raises(
        ValueError, match=r"is 'float64\[4, 2\]', expected a .npy array of integers"
    ):
        run("mpft", 64, experts_file=path)


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_2048_gpus_dispatch_in_a_minute(placement):
    """Issue 7's bar, of one core's time; the time is what the NICs' busiest needs."""
    start = time.process_time()
    report = run("mpft", 2048, placement=placement)
    assert time.process_time() - start < 60
    assert report.seconds == pytest.approx(report.bound_seconds, rel=1e-6)
    assert report.flows == 2048 * 14
