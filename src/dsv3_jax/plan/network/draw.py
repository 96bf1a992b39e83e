"""Pictures of a network in use: its graph where it is small, and a heat map of every layer."""

from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsv3_jax.plan.network.fabric import OWN_LAYERS
from dsv3_jax.plan.network.simulate import NetworkReport, Simulated
from dsv3_jax.plan.network.topology import GPUS_PER_NODE, Topology

MOST_DRAWN_SWITCHES, MOST_DRAWN_LINKS = 120, 1_200
_COLOURS = "viridis"
_INK, _PALE = "#2b2f36", "#dfe3e8"
_WIDTH_INCHES, _GRAPH_INCHES, _PANEL_INCHES = 11.0, 4.2, 1.15


def draw_png(simulated: Simulated, path: Path) -> None:
    """Writes the picture of `make_figure` to `path`."""
    FigureCanvasAgg(make_figure(simulated)).print_png(path)


def make_figure(simulated: Simulated) -> Figure:
    """Use of every link over the whole time, 0 to 1.

    On top the graph, if it has few enough switches; below a heat map for each kind of link, a
    column for a node (or a switch), a row for a GPU (or a port). Layers that carry nothing are left
    out.
    """
    report, fabric, outcome = simulated.report, simulated.fabric, simulated.outcome
    use = outcome.link_use
    maps = {
        name: _as_map(name, links, use, fabric.topology)
        for name, links in fabric.link_layers().items()
        if use[links].any()
    }
    shows_graph = 0 < report.links <= MOST_DRAWN_LINKS and report.switches <= MOST_DRAWN_SWITCHES
    heights = [_GRAPH_INCHES] * shows_graph + [_PANEL_INCHES] * len(maps)
    figure = Figure((_WIDTH_INCHES, sum(heights) + 1.2), dpi=130)
    figure.set_layout_engine("constrained", h_pad=0.06, w_pad=0.08)
    figure.suptitle(_title(report), fontsize=11, x=0.01, ha="left")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    colours = ScalarMappable(Normalize(0, 1), matplotlib.colormaps[_COLOURS])
    if shows_graph:
        switch_use = use[: fabric.switch_links].reshape(-1, 2).max(axis=1)
        _draw_graph(axes[0], fabric.topology, switch_use, colours)
    for panel, (name, (values, columns, rows)) in zip(
        axes[shows_graph:], maps.items(), strict=True
    ):
        _draw_map(panel, values, name, columns, rows)
    bar = figure.colorbar(colours, ax=list(axes), shrink=0.6, pad=0.01, aspect=30)
    bar.set_label("share of the link's capacity in use over the time", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def _title(report: NetworkReport) -> str:
    failed = f", failed: {report.failures}" if report.failures else ""
    return (
        f"{report.traffic} on {report.topology}, {report.gpus:,} GPUs, {report.routing} routing"
        f"{failed}: {report.seconds * 1e3:.4g} ms, busiest {report.bottleneck}"
    )


def _as_map(
    name: str, links: Int[np.ndarray, " links"], use: Float[np.ndarray, " all"], topology: Topology
) -> tuple[Float[np.ndarray, "rows columns"], str, str]:
    """Values, and what a column and a row are. Ports that a switch lacks are not a number."""
    if name in OWN_LAYERS:
        return use[links].reshape(-1, GPUS_PER_NODE).T, "node", "GPU"
    source = topology.links[links // 2, links % 2]
    order = np.argsort(source, kind="stable")
    switches, first, count = np.unique(source[order], return_index=True, return_counts=True)
    values = np.full((int(count.max()), len(switches)), np.nan)
    column = np.repeat(np.arange(len(switches)), count)
    values[np.arange(len(order)) - first[column], column] = use[links][order]
    return values, name.split(" to ")[0], "port"


def _draw_map(
    axes: Axes, values: Float[np.ndarray, "rows columns"], name: str, columns: str, rows: str
) -> None:
    axes.imshow(
        values,
        aspect="auto",
        cmap=_COLOURS,
        vmin=0,
        vmax=1,
        interpolation="nearest",
        origin="lower",
    )
    axes.set_facecolor(_PALE)
    mean, most = np.nanmean(values), np.nanmax(values)
    axes.set_title(f"{name}: mean {mean:.1%}, busiest {most:.1%}", fontsize=9, loc="left")
    axes.set_xlabel(columns, fontsize=8, labelpad=1)
    axes.set_ylabel(rows, fontsize=8)
    axes.tick_params(labelsize=7, length=2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))


def _draw_graph(
    axes: Axes, topology: Topology, use: Float[np.ndarray, " links"], colours: ScalarMappable
) -> None:
    """Switches in rows by layer, or on a circle; a link has the colour of its busier direction."""
    place = switch_places(topology)
    order = np.argsort(use)  # the busiest on top
    lines = LineCollection(place[topology.links[order]].tolist(), linewidths=0.7)
    lines.set_color([tuple(colour) for colour in colours.to_rgba(use[order]).tolist()])
    axes.add_collection(lines)
    axes.scatter(*place.T, s=26, color=_INK, zorder=3)
    axes.set_axis_off()
    axes.margins(0.03, 0.08)
    if len(topology.layers) == 1:
        return
    axes.set_xlim(-0.09, 1.01)
    for layer, name in enumerate(topology.layers):
        count = int((topology.switch_layer == layer).sum())
        axes.text(-0.01, layer, f"{name}: {count}", ha="right", va="center", fontsize=8, color=_INK)


def switch_places(topology: Topology) -> Float[np.ndarray, "switches 2"]:
    """Where each switch is drawn: x of 0 to 1, its layer as y; or round a circle."""
    if len(topology.layers) == 1:
        turn = 2 * np.pi * np.arange(topology.switches) / topology.switches
        return np.stack([np.cos(turn), np.sin(turn)], axis=1)
    x = np.zeros(topology.switches)
    for layer in range(len(topology.layers)):
        switches = np.flatnonzero(topology.switch_layer == layer)
        switches = switches[np.argsort(topology.switch_plane[switches], kind="stable")]
        x[switches] = (np.arange(len(switches)) + 0.5) / max(len(switches), 1)
    return np.stack([x, topology.switch_layer.astype(np.float64)], axis=1)
