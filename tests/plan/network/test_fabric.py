"""Ways of transfers: NVLink before the rail, round failed NICs, and the links' names."""

import numpy as np
import pytest

from dsv3_jax.plan.hardware import find_gpu
from dsv3_jax.plan.network.fabric import Fabric, Failures, make_fabric, parse_failures
from dsv3_jax.plan.network.fat_tree import build_ft2, build_mpft, build_mrft
from dsv3_jax.plan.network.fluid import run_flows
from dsv3_jax.plan.network.transfers import Transfers


def one_transfer(source: int, target: int, size: float = 8e9) -> Transfers:
    return Transfers(
        source=np.array([source]), target=np.array([target]), size_bytes=np.array([size])
    )


def names(fabric: Fabric, transfers: Transfers) -> list[list[str]]:
    """The links of each flow in the order of travel, switch links last."""
    flows = fabric.flows(transfers, routing="static")
    found = []
    for own, route in zip(flows.own, flows.route, strict=True):
        links = [int(link) for link in own if link >= 0]
        if route >= 0:
            part = slice(*flows.routes.start[route:][:2])
            links += flows.routes.link[part].tolist()
        found.append([fabric.link_name(link) for link in links])
    return found


def fabric_of(topology, *failed: str) -> Fabric:
    return Fabric(
        topology,
        network_bytes_per_second=40e9,
        nvlink_bytes_per_second=160e9,
        failures=parse_failures(list(failed)),
    )


def test_inside_a_node_over_nvlink():
    found = names(fabric_of(build_mpft(16)), one_transfer(9, 12))
    assert found == [["NVLink out of GPU 9", "NVLink in of GPU 12"]]


@pytest.mark.parametrize("build", [build_mpft, build_mrft])
def test_rails_are_changed_inside_the_node(build):
    """GPU 1 of node 0 to GPU 5 of node 1: NVLink to GPU 5, whose NIC shares the target's rail."""
    (found,) = names(fabric_of(build(16)), one_transfer(1, 13))
    assert found == [
        "NVLink out of GPU 1",
        "NVLink in of GPU 5",
        "NIC out of GPU 5",
        "NIC in of GPU 13",
    ]


def test_without_rails_from_nic_to_nic():
    (found,) = names(fabric_of(build_ft2(16)), one_transfer(1, 13))
    assert found == ["NIC out of GPU 1", "NIC in of GPU 13"]
    (far,) = names(fabric_of(build_ft2(64, radix=16)), one_transfer(0, 63))
    # 8 leaves of 8; endpoint 63 has digit 7, the last of four spines of two links to each leaf.
    assert far[2:] == ["leaf 0 to spine 11", "spine 11 to leaf 7"]


def test_a_failed_nic_is_gone_round_on_the_other_seven():
    """A seventh over each other rail, with NVLink at both ends."""
    fabric = fabric_of(build_mpft(16), "nic=1")
    flows = fabric.flows(one_transfer(1, 9, 7.0), routing="adaptive")
    assert flows.size_bytes.tolist() == [1.0] * 7
    found = names(fabric, one_transfer(1, 9))
    assert found[0] == [
        "NVLink out of GPU 1",
        "NVLink in of GPU 0",
        "NIC out of GPU 0",
        "NIC in of GPU 8",
        "NVLink out of GPU 8",
        "NVLink in of GPU 9",
    ]
    used = {link for links in found for link in links}
    assert not used & {"NIC out of GPU 1", "NIC in of GPU 9"}
    assert {f"NIC out of GPU {gpu}" for gpu in (0, 2, 3, 4, 5, 6, 7)} <= used


def test_other_transfers_do_not_notice():
    plain = names(fabric_of(build_mpft(16)), one_transfer(2, 10))
    assert names(fabric_of(build_mpft(16), "nic=1", "plane=5"), one_transfer(2, 10)) == plain


def test_a_plane_s_links_and_nics_carry_nothing():
    fabric = fabric_of(build_mpft(1024, radix=16), "plane=3")
    assert (fabric.capacity == 0).sum() == 2 * 128 + 2 * 128  # NICs; 16 leaves times 8 spines
    flows = fabric.flows(one_transfer(3, 1019, 7e9), routing="adaptive")
    outcome = run_flows(flows, fabric.capacity)
    assert outcome.link_bytes[fabric.capacity == 0].sum() == 0
    # Seven rails at 40 GB/s are slower together than what NVLink lets GPU 3 hand out: 160.
    assert outcome.total_seconds == pytest.approx(7e9 / 160e9)


def test_no_rail_left():
    failed = [f"nic={gpu}" for gpu in (0, 1, 2, 3, 12, 13, 14, 15)]
    fabric = fabric_of(build_mpft(16), *failed)
    with pytest.raises(ValueError, match="expected a rail that works on both node 0 and node 1"):
        fabric.flows(one_transfer(0, 8), routing="adaptive")
    assert len(fabric.flows(one_transfer(0, 3), routing="adaptive")) == 1


def test_bandwidths_of_a_gpu():
    fabric = make_fabric(build_mpft(16), find_gpu("h800"))
    assert sorted(set(fabric.capacity.tolist())) == [40e9, 160e9]
    fabric = make_fabric(build_mpft(16), find_gpu("h100"), achieved=False)
    assert sorted(set(fabric.capacity.tolist())) == [50e9, 450e9]


def test_layers_hold_every_link_once():
    fabric = fabric_of(build_mrft(2056))
    layers = fabric.link_layers()
    assert list(layers)[:4] == ["NIC out", "NIC in", "NVLink out", "NVLink in"]
    assert list(layers)[4:] == [
        "edge to aggregation",
        "aggregation to edge",
        "aggregation to core",
        "core to aggregation",
    ]
    links = np.concatenate(list(layers.values()))
    assert np.sort(links).tolist() == list(range(len(fabric.capacity)))
    for name, chosen in layers.items():
        start, *_ = name.split(" to ")
        assert fabric.link_name(int(chosen[0])).startswith(start)


@pytest.mark.parametrize(
    ("failed", "message"),
    [
        ("plane=8", "--fail plane is 8, expected below 8 in MPFT"),
        ("nic=16", "--fail nic is 16, expected below 16"),
        ("link=0", "--fail link is 0, expected below 0 in MPFT"),
        ("spine=1", "--fail is 'spine=1', expected plane=N, nic=N or link=N"),
        ("nic=x", "--fail is 'nic=x', expected"),
    ],
)
def test_failures_of_what_is_not_there(failed, message):
    with pytest.raises(ValueError, match=message):
        fabric_of(build_mpft(16), failed)


def test_a_single_plane_cannot_fail():
    with pytest.raises(ValueError, match=r"--fail is 'plane=0', expected plane only where"):
        fabric_of(build_ft2(16), "plane=0")
    with pytest.raises(ValueError, match="routing is 'magic', expected one of ecmp"):
        fabric_of(build_ft2(16)).flows(one_transfer(0, 8), routing="magic")
    assert str(Failures(nics=frozenset({3, 1}), planes=frozenset({2}))) == "plane=2, nic=1, nic=3"
