"""The picture of a run: right data, labelled axes, whatever keys the metrics hold."""

import math
import sys

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from dsv3_jax.train.plots import draw_run, make_figure


def make_metrics(steps=120, layers=3, experts=8, every=10):
    rng = np.random.default_rng(0)
    metrics = []
    for step in range(1, steps + 1):
        loss = 3 + 6 * math.exp(-step / 20)
        one = {"step": step, "loss": loss, "main_loss": loss, "mtp_loss": loss + 0.3}
        if layers:
            load = rng.integers(50, 150, (layers, experts))
            one["expert_load_max_over_mean"] = float((load.max(1) / load.mean(1)).max())
        if layers and step % every == 0:
            one["expert_load"] = load.tolist()
            one["router_bias"] = rng.normal(0, 0.001 * step, (layers, experts)).tolist()
        metrics.append(one)
        if step % 40 == 0:  # an evaluation may be an object of its own
            metrics.append({"step": step, "eval_loss": loss, "eval_bits_per_byte": loss / 2})
    return metrics


@pytest.mark.parametrize(
    "metrics",
    [
        make_metrics(),
        make_metrics(steps=30, layers=59, experts=256),
        make_metrics(layers=0),
        make_metrics(steps=1, every=1),
        make_metrics(steps=5, every=10),  # no sample of the router yet
        [{"step": 1, "loss": math.nan}],
        [{"step": 1, "loss": 9.0}, {"step": 2, "loss": math.inf, "expert_load": [[0, 0]]}],
    ],
    ids=["usual", "large", "dense", "one step", "no sample", "nan", "no load"],
)
def test_every_run_has_a_picture_with_labelled_axes(tmp_path, metrics):
    draw_run(metrics, tmp_path / "run.png", title="a run")
    height, width, _ = matplotlib.image.imread(tmp_path / "run.png").shape
    has_router = any("expert_load" in m for m in metrics)
    assert (width, height) == (1800, 1200 if has_router else 600)
    axes = [a for a in make_figure(metrics).axes if a.get_label() != "<colorbar>"]
    assert len(axes) == (4 if has_router else 1)
    for a in axes:
        assert a.get_title(loc="left") and a.get_xlabel() and a.get_ylabel()


def test_the_curves_are_the_metrics():
    metrics = make_metrics()
    losses, imbalance, load_map, biases = make_figure(metrics).axes[:4]
    by_label = {line.get_label(): line for line in losses.get_lines()}
    steps = [m for m in metrics if "main_loss" in m]
    expected = [m["main_loss"] for m in steps[9:12]]
    assert by_label["next token, mean of 2 steps"].get_xdata()[10] == 11
    assert np.mean(expected[:2]) == pytest.approx(
        by_label["next token, mean of 2 steps"].get_ydata()[10]
    )
    np.testing.assert_array_equal(by_label["held out"].get_xdata(), [40, 80, 120])
    assert "bits per byte" in losses.get_title(loc="left")

    load = np.array([m["expert_load"] for m in metrics if "expert_load" in m])
    relative = load / load.mean(axis=2, keepdims=True)
    by_label = {line.get_label(): line for line in imbalance.get_lines()}
    np.testing.assert_allclose(by_label["2"].get_ydata(), relative[:, 2].max(axis=1))
    assert len(by_label["worst"].get_ydata()) == 120
    np.testing.assert_allclose(load_map.get_images()[0].get_array(), relative[-1])
    bias = np.array([m["router_bias"] for m in metrics if "router_bias" in m])
    drawn = np.array([line.get_ydata() for line in biases.get_lines()[:24]])
    np.testing.assert_array_equal(drawn, bias.transpose(1, 2, 0).reshape(24, -1))


def test_nothing_global_changes(tmp_path):
    settings, modules = dict(matplotlib.rcParams), set(sys.modules)
    draw_run(make_metrics(), tmp_path / "run.png")
    assert dict(matplotlib.rcParams) == settings
    assert "matplotlib.pyplot" not in set(sys.modules) - modules


def test_metrics_without_a_loss_are_refused(tmp_path):
    with pytest.raises(ValueError, match="metrics of 0 objects hold no loss"):
        draw_run([], tmp_path / "run.png")
