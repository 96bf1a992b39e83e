"""The picture: a panel for each layer that carries something, and the graph of a small network."""

import matplotlib.image
import numpy as np
import pytest

from dsv3_jax.plan.network.draw import draw_png, make_figure, switch_places
from dsv3_jax.plan.network.simulate import Scenario, build_topology, simulate


def panels(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.images]


def test_panels_of_a_tree():
    simulated = simulate(
        Scenario(topology="ft2", gpus=64, radix=16, traffic="alltoall", tolerance=0.05)
    )
    figure = make_figure(simulated)
    found = panels(figure)
    assert [title.split(":")[0] for title in found] == [
        "NIC out",
        "NIC in",
        "NVLink out",
        "NVLink in",
        "leaf to spine",
        "spine to leaf",
    ]
    graph = figure.axes[0]
    assert len(graph.collections[0].get_segments()) == 64  # 8 leaves, 8 uplinks each
    assert [text.get_text() for text in graph.texts] == ["leaf: 8", "spine: 4"]
    heat = {axes.get_title(loc="left").split(":")[0]: axes for axes in figure.axes if axes.images}
    values = heat["leaf to spine"].images[0].get_array()
    assert values.shape == (8, 8)  # ports, leaves
    links = simulated.fabric.link_layers()["leaf to spine"]
    assert np.nanmax(values) == pytest.approx(simulated.outcome.link_use[links].max())
    nics = heat["NIC out"].images[0].get_array()
    assert nics.shape == (8, 8)  # GPUs of a node, nodes
    assert nics[3, 2] == simulated.outcome.link_use[simulated.fabric.link_of(0, np.array([19]))[0]]


def test_layers_that_carry_nothing_are_left_out():
    simulated = simulate(Scenario(topology="mpft", gpus=64, traffic="pipeline", stages=2))
    assert [title.split(":")[0] for title in panels(make_figure(simulated))] == [
        "NIC out",
        "NIC in",
    ]


def test_a_file(tmp_path):
    simulated = simulate(Scenario(topology="slimfly", gpus=64, traffic="pipeline", stages=2))
    path = tmp_path / "use.png"
    draw_png(simulated, path)
    height, width, _ = matplotlib.image.imread(path).shape
    assert width == 1430 and height > 700


def test_planes_are_drawn_side_by_side():
    tree = build_topology("mpft", 128, radix=8)
    place = switch_places(tree)
    for layer in (0, 1):
        switches = np.flatnonzero(tree.switch_layer == layer)
        left_to_right = switches[np.argsort(place[switches, 0])]
        assert (np.diff(tree.switch_plane[left_to_right]) >= 0).all()
        assert (place[switches, 1] == layer).all()
    circle = switch_places(build_topology("slimfly", 64))
    assert np.hypot(*circle.T) == pytest.approx(1)
