"""Trains the recipes of `RUNS`, one after the other, and compares them with BF16 of the same seed.

    python experiments/precision/run.py              what is not trained yet, then the comparison
    python experiments/precision/run.py --compare    the comparison alone

Runs are written under runs/precision-NAME, as every run under the current directory; one that was
stopped goes on. The comparison writes results.json and loss.png beside this file. Losses are
smoothed by an exponential mean of 0.9, as in the DeepSeek-V3 Technical Report, appendix B.1; runs
of one seed begin with the same weights and see the same rows in the same order.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from dsv3_jax.train.metrics import read_metrics

HERE = Path(__file__).resolve().parent
FP8 = ("precision.recipe=fp8",)
RECIPES: dict[str, tuple[str, ...]] = {
    "bf16": ("precision.recipe=bf16",),
    "bf16, FP32 moments": ("precision.recipe=bf16", "optimizer.moment_dtype=float32"),
    "fp8": FP8,
    "fp8, LogFMT-10": (*FP8, "precision.combine=logfmt10"),
    "fp8, LogFMT-8": (*FP8, "precision.combine=logfmt8"),
    "per-tensor scales": (*FP8, "precision.rules=per_tensor_scales"),
    "128x128 gradients": (*FP8, "precision.rules=block_gradients"),
    "E5M2 gradients": (*FP8, "precision.rules=e5m2_gradients"),
}
RUNS = [("bf16", seed) for seed in (0, 1, 2)] + [("fp8", seed) for seed in (0, 1, 2)]
RUNS += [(recipe, 0) for recipe in RECIPES if recipe not in ("bf16", "fp8")]
SMOOTHING = 0.9
EVERY = 10
"""Of the smoothed losses those of every tenth step are written down."""


def run_name(recipe: str, seed: int) -> str:
    return "precision-" + recipe.replace(", ", "-").replace(" ", "-").lower() + f"-{seed}"


def train(recipe: str, seed: int) -> None:
    """Trains one run to its end; the trainer says so where it is there already."""
    assignments = [*RECIPES[recipe], f"train.seed={seed}", f"train.name={run_name(recipe, seed)}"]
    options = [word for assignment in assignments for word in ("--set", assignment)]
    program = HERE.parents[1] / "train.py"
    subprocess.run([sys.executable, program, HERE / "config.py", *options], check=True)


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Exponential mean, which begins with the first loss."""
    result, mean = np.empty_like(losses), losses[0]
    for i, loss in enumerate(losses):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        result[i] = mean
    return result


def read_run(recipe: str, seed: int) -> dict:
    """The smoothed losses of a run, and its held-out loss at the end."""
    steps = read_metrics(Path("runs") / run_name(recipe, seed) / "metrics.jsonl")
    losses = np.array([step["loss"] for step in steps if "loss" in step])
    return {"smoothed": smoothed(losses), "eval_loss": steps[-1]["eval_loss"]}


def compare() -> dict:
    """For each run, against BF16 of its seed: the relative differences of the smoothed loss over
    the second half of the run, and that of the held-out loss."""
    runs = {(recipe, seed): read_run(recipe, seed) for recipe, seed in RUNS}
    result = {}
    for (recipe, seed), run in runs.items():
        of_bf16 = runs["bf16", seed]
        difference = run["smoothed"] / of_bf16["smoothed"] - 1
        half = difference[len(difference) // 2 :]
        result[f"{recipe}, seed {seed}"] = {
            "steps": len(difference),
            "mean_difference": float(np.mean(half)),
            "mean_magnitude": float(np.mean(np.abs(half))),
            "largest_magnitude": float(np.max(np.abs(half))),
            "eval_loss": run["eval_loss"],
            "eval_difference": run["eval_loss"] / of_bf16["eval_loss"] - 1,
            "smoothed_loss": [round(float(x), 4) for x in run["smoothed"][EVERY - 1 :: EVERY]],
        }
    return result


def draw(result: dict, path: Path) -> None:
    """Smoothed losses, and their difference to BF16 of the same seed in percent."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    colors = dict(zip(RECIPES, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for name, run in result.items():
        recipe, seed = name.rsplit(", seed ", 1)
        losses = np.array(run["smoothed_loss"])
        of_bf16 = np.array(result[f"bf16, seed {seed}"]["smoothed_loss"])
        steps = EVERY * np.arange(1, len(losses) + 1)
        style = {"color": colors[recipe], "linestyle": ("-", "--", ":")[int(seed)], "lw": 1.2}
        label = recipe if seed == "0" else None
        left.plot(steps, losses, label=label, **style)
        if recipe != "bf16":
            right.plot(steps, 100 * (losses / of_bf16 - 1), label=label, **style)
    right.axhspan(-0.25, 0.25, color="0.9", zorder=0)
    right.set_ylim(-1.5, 1.5)
    left.set_ylabel("training loss, smoothed by 0.9")
    right.set_ylabel("difference to BF16 of the same seed, %")
    right.set_title("the report's bound is grey; dashed and dotted are seeds 1 and 2", fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", action="store_true", help="train nothing")
    if not parser.parse_args().compare:
        for recipe, seed in RUNS:
            train(recipe, seed)
    result = compare()
    text = json.dumps(result, indent=1)
    (HERE / "results.json").write_text(text + "\n", encoding="utf-8")
    draw(result, HERE / "loss.png")
    for name, run in result.items():
        mean, magnitude, largest, held_out = (
            100 * run[key]
            for key in ("mean_difference", "mean_magnitude", "largest_magnitude", "eval_difference")
        )
        print(
            f"{name:28} {mean:+.3f} % mean, {magnitude:.3f} mean magnitude, {largest:.3f} largest;"
            f" held out {run['eval_loss']:.4f} ({held_out:+.3f} %)"
        )


if __name__ == "__main__":
    main()
