"""The picture of a run: loss, expert load, router bias, from metrics.jsonl alone."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

MAX_CURVE_LAYERS = 6
"""Routed layers drawn as curves, spread evenly from first to last; the heat map shows all."""
MAX_CURVE_EXPERTS = 32
"""Experts of a layer drawn as bias curves; of more, the extremes and quartiles are."""

_RELATIVE_LOAD = "tokens, relative to the layer's mean"
_MAIN, _MTP, _EVAL, _GREY = "#1f5fa8", "#d9822b", "#c0392b", "#8a8f98"


def draw_run(metrics: list[dict[str, Any]], path: Path, title: str = "") -> None:
    """Writes a PNG of 1,800 x 1,200 pixels (600 high without routers) to `path`.

    Panels: losses over steps; each layer's busiest expert over the mean; a heat map of the last
    `expert_load`; every expert's `router_bias` over steps. Keys as in `dsv3_jax.train.metrics`;
    objects without a key are left out of its panel. Raises ValueError where no object has a loss.
    """
    FigureCanvasAgg(make_figure(metrics, title)).print_png(path)


def make_figure(metrics: list[dict[str, Any]], title: str = "") -> Figure:
    """The figure that `draw_run` writes, for a notebook to show."""
    if not any("main_loss" in m or "loss" in m for m in metrics):
        raise ValueError(f"metrics of {len(metrics)} objects hold no loss to draw")
    has_router = any("expert_load" in m or "router_bias" in m for m in metrics)
    figure = Figure(figsize=(12, 8 if has_router else 4), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold")
    if has_router:
        axes = figure.subplots(2, 2)
        _draw_losses(axes[0, 0], metrics)
        _draw_imbalance(axes[0, 1], metrics)
        _draw_load_map(axes[1, 0], metrics)
        _draw_biases(axes[1, 1], metrics)
    else:
        _draw_losses(figure.subplots(), metrics)
    return figure


def _draw_losses(axes: Axes, metrics: list[dict[str, Any]]) -> None:
    main_key = "main_loss" if any("main_loss" in m for m in metrics) else "loss"
    for key, label, colour in ((main_key, "next token", _MAIN), ("mtp_loss", "MTP", _MTP)):
        steps, losses = _series(metrics, key)
        if not np.any(losses):  # without MTP its loss is 0 in every step
            continue
        window = max(1, len(losses) // 50)
        if window > 1:
            axes.plot(steps, losses, color=colour, linewidth=0.5, alpha=0.35)
            label = f"{label}, mean of {window} steps"
        smooth = _running_mean(losses, window)
        axes.plot(steps, smooth, _marker(steps), color=colour, linewidth=1.5, label=label)
    steps, losses = _series(metrics, "eval_loss")
    if len(steps):
        axes.plot(steps, losses, "o-", color=_EVAL, markersize=4, linewidth=1, label="held out")
    _, bits = _series(metrics, "eval_bits_per_byte")
    ending = f"; held out {losses[-1]:.3f} at the end" if len(losses) else ""
    ending += f" ({bits[-1]:.3f} bits per byte)" if len(bits) else ""
    _label(axes, f"Loss{ending}", "step", "nats per token")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def _draw_imbalance(axes: Axes, metrics: list[dict[str, Any]]) -> None:
    steps, worst = _series(metrics, "expert_load_max_over_mean")
    if len(steps):
        axes.plot(steps, worst, color=_GREY, linewidth=0.6, alpha=0.7, label="worst")
    steps, load = _stacked(metrics, "expert_load")
    relative = load.max(axis=2, initial=0) / np.maximum(load.mean(axis=2), 1e-30)
    for layer, colour in _curve_layers(load.shape[1]):
        axes.plot(
            steps, relative[:, layer], _marker(steps), color=colour, linewidth=1.3, label=f"{layer}"
        )
    axes.set_ylim(bottom=1)
    _label(axes, "Expert load: busiest expert of a layer; 1 is balanced", "step", _RELATIVE_LOAD)
    _layer_legend(axes)


def _draw_load_map(axes: Axes, metrics: list[dict[str, Any]]) -> None:
    steps, load = _stacked(metrics, "expert_load")
    title = "Expert load"
    if len(steps):
        relative = load[-1] / np.maximum(load[-1].mean(axis=1, keepdims=True), 1e-30)
        # Blue below the mean, red above it; 1 is white whatever the extremes are.
        image = axes.imshow(
            relative, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0, vmax=2
        )
        bar = axes.figure.colorbar(image, ax=axes, extend="max", pad=0.02)
        bar.set_label(_RELATIVE_LOAD, fontsize=9)
        bar.ax.tick_params(labelsize=8)
        title = f"Expert load at step {steps[-1]:,.0f}, 1 is balanced"
        axes.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    _label(axes, title, "expert", "routed layer")
    axes.grid(False)


def _draw_biases(axes: Axes, metrics: list[dict[str, Any]]) -> None:
    steps, bias = _stacked(metrics, "router_bias")
    title = "Router bias: a curve for every expert"
    if bias.shape[2] > MAX_CURVE_EXPERTS:
        title = "Router bias: lowest, quartiles and highest of a layer's experts"
        bias = np.moveaxis(np.percentile(bias, [0, 25, 50, 75, 100], axis=2), 0, 2)
    for layer, colour in _curve_layers(bias.shape[1]):
        curves = axes.plot(
            steps, bias[:, layer], _marker(steps), color=colour, linewidth=0.9, alpha=0.55
        )
        curves[0].set_label(f"{layer}")
    axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
    _label(axes, title, "step", "bias, added to a score of 0 to 1")
    _layer_legend(axes)


def _curve_layers(layers: int) -> list[tuple[int, Any]]:
    """(layer, colour) of the layers drawn as curves."""
    if layers == 0:
        return []
    chosen = np.unique(np.linspace(0, layers - 1, min(layers, MAX_CURVE_LAYERS)).round())
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(chosen)))
    return list(zip(chosen.astype(int).tolist(), colours, strict=True))


def _layer_legend(axes: Axes) -> None:
    """One row, in a strip that is added above the curves."""
    if not axes.get_legend_handles_labels()[0]:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.12 * (high - low))
    legend = axes.legend(
        title="routed layer",
        loc="upper left",
        ncols=MAX_CURVE_LAYERS + 1,
        fontsize=8,
        title_fontsize=8,
        handlelength=1.3,
        columnspacing=1.2,
        frameon=False,
        alignment="left",
    )
    for handle in legend.get_lines():
        handle.set(linewidth=1.8, alpha=1)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(True, color="#e6e8eb", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _running_mean(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """The mean of up to `window` values around each one, fewer at the ends."""
    ones = np.ones(window)
    counts = np.convolve(np.ones(len(values)), ones, mode="same")
    return np.convolve(values, ones, mode="same") / counts


def _marker(steps: Float[np.ndarray, " samples"]) -> str:
    """A line, or a dot where one sample makes no line."""
    return "o" if len(steps) == 1 else "-"


def _series(
    metrics: list[dict[str, Any]], key: str
) -> tuple[Float[np.ndarray, " samples"], Float[np.ndarray, " samples"]]:
    """(steps, values) of the objects that have `key` and a finite value of it."""
    pairs = [(m["step"], m[key]) for m in metrics if key in m and np.isfinite(m[key])]
    both = np.array(pairs, np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _stacked(
    metrics: list[dict[str, Any]], key: str
) -> tuple[Float[np.ndarray, " samples"], Float[np.ndarray, "samples layers experts"]]:
    """(steps, values) of the objects that have `key`, a matrix [layers][experts]."""
    found = [m for m in metrics if key in m]
    steps = np.array([m["step"] for m in found], np.float64)
    values = np.array([m[key] for m in found], np.float64)
    return steps, values if len(found) else values.reshape(0, 0, 0)
