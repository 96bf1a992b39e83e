"""Sweeps: every combination, what is refused, and its picture."""

from pathlib import Path

import matplotlib.image
import pytest

from dsv3_jax.config import apply_overrides, read_config
from dsv3_jax.plan.cluster import find_cluster
from dsv3_jax.plan.plan_page import sweep_page
from dsv3_jax.plan.sweep import Vary, draw_sweep, sweep, sweep_table
from dsv3_jax.plan.train_plan import predict_training

CONFIG = apply_overrides(
    read_config(Path(__file__).parents[2] / "configs" / "v3_671b.py"),
    ["parallel.micro_batches=32", "train.batch_size=4096"],
)
H800 = find_cluster("h800_2048")
VARIED = [
    Vary.parse("precision.recipe=fp8,bf16"),
    Vary.parse("gpu.network_achieved_bytes_per_second=40e9,80e9"),
]


@pytest.fixture(scope="module")
def points():
    return sweep(CONFIG, H800, VARIED)


def test_every_combination_is_planned(points):
    assert [point.values for point in points] == [
        ("fp8", "40e9"),
        ("fp8", "80e9"),
        ("bf16", "40e9"),
        ("bf16", "80e9"),
    ]
    steps = [point.plan.step_seconds for point in points]
    assert steps[0] == predict_training(CONFIG, H800)[0].step_seconds
    assert steps[1] < steps[0] < steps[2]


def test_what_is_refused_stays_in_the_table():
    varied = [Vary.parse("parallel.pipe=16,3")]
    found = sweep(CONFIG, H800, varied)
    assert found[0].plan is not None and found[1].plan is None
    assert "an even number" in found[1].reason
    rows = sweep_table(found, varied).rows
    assert rows[1][0] == "3" and rows[1][-1] == found[1].reason
    with pytest.raises(ValueError, match=r"--vary is \['parallel.speed'\], expected a possible"):
        sweep(CONFIG, H800, [Vary.parse("parallel.speed=1,2")])
    with pytest.raises(ValueError, match=r"gpu.FIELD is 'speed'"):
        sweep(CONFIG, H800, [Vary.parse("gpu.speed=1,2")])


@pytest.mark.parametrize("text", ["parallel.pipe", "parallel.pipe=", "pipe=1,2", "=1"])
def test_a_wrong_field_is_named(text):
    with pytest.raises(ValueError, match=r"--vary is .*, expected SECTION.FIELD=A,B,C"):
        Vary.parse(text)


def test_picture_and_page(points, tmp_path):
    draw_sweep(points, VARIED, tmp_path / "sweep.png")
    picture = matplotlib.image.imread(tmp_path / "sweep.png")
    assert picture.shape[1] == 1200 and picture[..., :3].std() > 0.1
    html = sweep_page(sweep_table(points, VARIED), points)
    assert html.count("<svg") == len(points)
    assert "src=" not in html and "href=" not in html  # nothing from outside
