"""Fat trees built and counted: ports, layers, planes, rails."""

import numpy as np
import pytest

from dsv3_jax.plan.network.fat_tree import build_ft2, build_ft3, build_mpft, build_mrft
from dsv3_jax.plan.network.topology import diameter, hops_between


def ports(topology) -> np.ndarray:
    """Links and endpoints of each switch."""
    links = np.bincount(topology.links.ravel(), minlength=topology.switches)
    return links + np.bincount(topology.endpoint_switch, minlength=topology.switches)


def uplinks(topology) -> np.ndarray:
    """Links of each lowest switch."""
    lowest = np.flatnonzero(topology.switch_layer == 0)
    return np.bincount(topology.links.ravel(), minlength=topology.switches)[lowest]


def test_the_textbook_fat_tree_of_radix_4():
    """Al-Fares et al., SIGCOMM 2008: k = 4 has 16 hosts, 4 cores, 8 + 8 switches in 4 pods."""
    tree = build_ft3(16, radix=4)
    assert tree.endpoints == 16
    assert np.bincount(tree.switch_layer).tolist() == [8, 8, 4]
    assert len(tree.links) == 32
    assert (ports(tree) == 4).all()
    assert diameter(tree) == 4


@pytest.mark.parametrize("radix", [4, 6, 8, 16])
def test_full_two_layers(radix):
    tree = build_ft2(radix**2 // 2, radix)
    assert (ports(tree) == radix).all()
    leaves, spines = (np.flatnonzero(tree.switch_layer == layer) for layer in (0, 1))
    assert (len(leaves), len(spines)) == (radix, radix // 2)
    every_pair = {(int(a), int(b)) for a in leaves for b in spines}
    assert {(int(a), int(b)) for a, b in tree.links} == every_pair
    assert diameter(tree) == 2


@pytest.mark.parametrize("gpus", [40, 128, 192, 512, 1000])
@pytest.mark.parametrize("build", [build_ft2, build_ft3, build_mpft, build_mrft])
def test_a_partial_tree_has_the_ports_and_does_not_block(build, gpus):
    """No switch has more ports than the radix, no leaf fewer uplinks than endpoints."""
    tree = build(gpus, radix=64)
    assert tree.endpoints == gpus
    assert ports(tree).max() <= 64
    below = np.bincount(tree.endpoint_switch)
    lonely = len(np.unique(tree.endpoint_switch)) == tree.planes
    assert lonely or (uplinks(tree) >= below[: len(uplinks(tree))]).all()


def test_planes_have_no_way_to_each_other():
    tree = build_mpft(512, radix=16)
    assert tree.planes == 8
    assert (tree.endpoint_plane == np.arange(512) % 8).all()
    assert (tree.switch_plane[tree.endpoint_switch] == tree.endpoint_plane).all()
    for plane in range(8):
        switch = int(tree.endpoint_switch[plane])
        reached = hops_between(tree, switch) >= 0
        assert (reached == (tree.switch_plane == plane)).all()


@pytest.mark.parametrize(("gpus", "layers"), [(128, 2), (2048, 2), (2056, 3), (16384, 3)])
def test_rails(gpus, layers):
    """32 neighbouring nodes' NICs of one index share a leaf; rails are joined above."""
    tree = build_mrft(gpus)
    assert len(tree.layers) == layers
    leaf = tree.endpoint_switch.reshape(-1, 8)
    for first in range(0, len(leaf), 32):
        block = leaf[first : first + 32]
        assert (block == block[0]).all()
        assert len(set(block[0].tolist())) == 8
    assert ports(tree).max() <= 64
    assert (hops_between(tree, int(leaf[0, 0])) >= 0).all()


def test_a_pod_of_three_layered_rails_is_one_rail():
    tree = build_mrft(16384)
    hops = hops_between(tree, int(tree.endpoint_switch[0]))[tree.endpoint_switch].reshape(-1, 8)
    assert (hops[:1024, 0] <= 2).all()  # over the pod's aggregation switches
    assert (hops[:, 1:] == 4).all()  # over the cores


@pytest.mark.parametrize(
    ("build", "gpus", "message"),
    [
        (build_ft2, 2056, "endpoints is 2056, expected 1 to 2048 .* two-layer"),
        (build_ft3, 65544, "endpoints is 65544, expected 1 to 65536"),
        (build_mpft, 16392, "endpoints is 2049, expected 1 to 2048 .* plane"),
        (build_mpft, 12, "gpus is 12, expected a positive multiple of 8"),
        (build_mrft, 0, "gpus is 0, expected a positive multiple of 8"),
    ],
)
def test_what_does_not_fit(build, gpus, message):
    with pytest.raises(ValueError, match=message):
        build(gpus)


def test_an_odd_radix_is_refused():
    with pytest.raises(ValueError, match="radix is 7, expected an even number"):
        build_ft2(8, radix=7)
