"""Whole runs of a tiny model: what they write, how they stop, and that going on changes no bit."""

import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest
import tokenizers
from jax.experimental.compilation_cache import compilation_cache

from dsv3_jax import cli
from dsv3_jax.checkpoint import CheckpointManager, find_damage
from dsv3_jax.config import (
    DataConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    from_dict,
    read_config,
)
from dsv3_jax.data.loader import prepare
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.train import loop
from dsv3_jax.train.diagnosis import NonFiniteError
from dsv3_jax.train.loop import Interrupted, train
from dsv3_jax.train.metrics import read_metrics
from tests import oracle
from tests.oracle.cases import random_tokens, tiny_config
from tests.train.models import GOLDEN, hub_tensors, load_golden, model_config, model_of, state_of

ROOT = Path(__file__).resolve().parents[2]
STEPS, BATCH, SEQ = 16, 4, 16
KEYS = {
    *("step", "tokens_seen", "loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm"),
    *("learning_rate", "tokens_per_second", "step_seconds", "expert_load_max_over_mean"),
}
TIMES = {"tokens_per_second", "step_seconds"}
WORDS = ("the", "model", "of", "a", "token", "is", "an", "expert", "in", "this", "layer", "routes")

# The environment's SECONDS_A_STEP slows a run down, so that there is time to stop it.
CONFIG = """
import os
import time

from dsv3_jax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig


def config() -> RunConfig:
    if "SECONDS_A_STEP" in os.environ:
        slow_down(float(os.environ["SECONDS_A_STEP"]))
    return RunConfig(
        model=ModelConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            first_k_dense_replace=1,
            num_attention_heads=2,
            q_lora_rank=None,
            kv_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            max_position_embeddings=64,
            initializer_range=0.02,
        ),
        data=DataConfig(source="text", paths=("texts/*.txt",), seq_len=16, eval_fraction=0.2),
        train=TrainConfig(
            name="tiny",
            steps=16,
            batch_size=4,
            eval_every=8,
            eval_batches=2,
            checkpoint_every=4,
            keep_checkpoints=2,
        ),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=2),
    )


def slow_down(seconds):
    from dsv3_jax.train.metrics import MetricsWriter

    write = MetricsWriter.write

    def write_and_wait(self, metrics):
        write(self, metrics)
        time.sleep(seconds)

    MetricsWriter.write = write_and_wait
"""


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """A compilation cache for the runs of this file, those in processes of their own too."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def make_folder(folder: Path) -> Path:
    """`folder` with texts and config.py, the same every time."""
    (folder / "texts").mkdir(parents=True)
    (folder / "config.py").write_text(CONFIG)
    generator = random.Random(0)
    for number in range(16):
        text = " ".join(generator.choice(WORDS) for _ in range(120))
        (folder / "texts" / f"{number:02}.txt").write_text(text + "\n")
    return folder


def run_here(folder: Path) -> Path:
    """The run directory of config.py, trained to its end in this process."""
    with contextlib.chdir(folder):
        return folder / train(read_config("config.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the whole run that no one interrupted."""
    folder = make_folder(tmp_path_factory.mktemp("whole"))
    run_here(folder)
    return folder


@pytest.fixture(scope="module")
def metrics(folder):
    return read_metrics(folder / "runs" / "tiny" / "metrics.jsonl")


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(folder, tmp_path / "copy")


def assert_same_run(folder: Path, metrics: list[dict]) -> None:
    """Every number of every step is the same float, times apart."""
    found = read_metrics(folder / "runs" / "tiny" / "metrics.jsonl")
    for one, other in zip(found, metrics, strict=True):
        assert one.keys() == other.keys()
        assert {k: one[k] for k in one.keys() - TIMES} == {k: other[k] for k in one.keys() - TIMES}


def weights_after(folder: Path, step: int, config: RunConfig | None = None) -> dict:
    """The weights of a checkpoint by their hub names."""
    config = config or read_config(folder / "config.py")
    zeros = {n: np.zeros(s) for n, s in oracle.weight_shapes(fields_of(config)).items()}
    abstract = jax.eval_shape(lambda: state_of(config, zeros)[1])
    with CheckpointManager(folder / "runs" / config.train.name / "checkpoints", 9) as manager:
        state = manager.restore(abstract, step).state
    assert int(state.step) == step
    return hub_tensors(config.model, state.params, state.selection_bias)


def fields_of(config: RunConfig) -> dict:
    return dataclasses.asdict(config.model)


def test_a_run_leaves_what_the_design_says(folder):
    run = folder / "runs" / "tiny"
    config = json.loads((run / "config.json").read_text())
    environment = config.pop("environment")
    assert from_dict(RunConfig, config) == read_config(folder / "config.py")
    assert environment["versions"]["jax"] == jax.__version__
    tokenizer = tokenizers.Tokenizer.from_file(str(run / "tokenizer.json"))
    assert 256 < tokenizer.get_vocab_size() <= 300
    assert matplotlib.image.imread(run / "training.png").shape[:2] == (1200, 1800)
    assert any((run / "tensorboard").iterdir())
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["12", "16"]
    assert find_damage(run / "checkpoints" / "16") is None
    assert sorted(p.name for p in folder.iterdir()) == ["config.py", "runs", "texts"]
    assert [p.name for p in (folder / "runs").iterdir()] == ["tiny"]


def test_every_step_has_its_metrics(metrics):
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    for m in metrics:
        assert m.keys() >= KEYS
        assert m["tokens_seen"] == m["step"] * BATCH * SEQ
        assert m["tokens_per_second"] == pytest.approx(BATCH * SEQ / m["step_seconds"])
        done = (m["step"] - 1) / STEPS
        mtp_weight = 0.3 if done < 10 / 14.8 else 0.1
        terms = m["main_loss"] + mtp_weight * m["mtp_loss"] + 1e-4 * m["balance_loss"]
        assert m["loss"] == pytest.approx(terms, rel=1e-6)
        if done < 10 / 14.8:
            assert m["learning_rate"] == pytest.approx(1e-2 * min(m["step"] / 2, 1))
        else:
            assert 1e-3 < m["learning_rate"] < 1e-2
    evaluated = [m["step"] for m in metrics if "eval_loss" in m]
    assert evaluated == [8, 16] == [m["step"] for m in metrics if "eval_bits_per_byte" in m]


def test_the_loss_begins_at_the_vocabularys_logarithm_and_falls(metrics):
    assert metrics[0]["main_loss"] == pytest.approx(math.log(300), rel=0.01)
    assert metrics[0]["mtp_loss"] == pytest.approx(math.log(300) * 15 / 16, rel=0.01)
    assert metrics[-1]["main_loss"] < 0.7 * metrics[0]["main_loss"]
    assert metrics[-1]["eval_loss"] < metrics[7]["eval_loss"]


def test_the_bias_follows_the_load_from_step_to_step(metrics):
    """Two routed layers: an MoE layer and the MTP module, which has a target less a row."""
    bias = np.zeros((2, 8))
    for m in metrics:
        load = np.array(m["expert_load"])
        assert load.sum(axis=1).tolist() == [BATCH * SEQ * 2, BATCH * (SEQ - 1) * 2]
        worst = (load.max(axis=1) / load.mean(axis=1)).max()
        assert m["expert_load_max_over_mean"] == pytest.approx(worst)
        bias = bias + 0.001 * np.sign(load.mean(axis=1, keepdims=True) - load)
        np.testing.assert_allclose(m["router_bias"], bias, atol=1e-6)


def test_the_evaluation_is_that_of_the_weights_after_the_step(folder, metrics):
    """The oracle's loss of the held-out rows under the last checkpoint's weights."""
    config = read_config(folder / "config.py")
    tokenizer = load_tokenizer(folder / "runs" / "tiny" / "tokenizer.json", 300)
    with contextlib.chdir(folder):
        rows = prepare(config.data, 300, 0, tokenizer).held_out_rows
    rows = np.stack([rows[i] for i in range(2 * BATCH)])
    expected = oracle.compute_losses(fields_of(config), weights_after(folder, 16), rows, 0, 0)
    assert metrics[-1]["eval_loss"] == pytest.approx(expected.main, rel=1e-5)
    targets = rows[:, 1:].ravel().tolist()
    text_bytes = sum(len(tokenizer.decode([target]).encode()) for target in targets)
    bits = expected.main * len(targets) / math.log(2) / text_bytes
    assert metrics[-1]["eval_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_a_finished_run_is_left_alone(copied, capsys):
    def contents() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in (copied / "runs").rglob("*") if p.is_file()}

    before = contents()
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run_here(copied)
    assert contents() == before
    assert "all 16 steps are done" in capsys.readouterr().out
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_a_damaged_step_is_skipped_with_a_warning(copied, metrics, caplog):
    """The run goes on from the step before, over the same numbers, and replaces it."""
    newest = copied / "runs" / "tiny" / "checkpoints" / "16"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    run_here(copied)
    assert f"{newest}: checkpoint step skipped" in caplog.text
    assert_same_run(copied, metrics)
    assert find_damage(newest) is None


def start(folder: Path, seconds_a_step: float) -> subprocess.Popen:
    """`python train.py config.py` in a process of its own."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "config.py"],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(paths), "SECONDS_A_STEP": str(seconds_a_step)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_written(folder: Path) -> int:
    path = folder / "runs" / "tiny" / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def wait_for_steps(process: subprocess.Popen, folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 300
    while steps_written(folder) < steps:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"{steps_written(folder)} steps, expected {steps}"
        time.sleep(0.01)


@pytest.mark.slow
def test_sigterm_and_sigint_save_and_going_on_changes_no_bit(folder, tmp_path, metrics):
    """Stopped between checkpoints; exit codes as a shell expects them."""
    codes = {signal.SIGTERM: 143, signal.SIGINT: 130}
    runs = {number: make_folder(tmp_path / number.name) for number in codes}
    processes = {number: start(runs[number], 0.3) for number in codes}
    for number, process in processes.items():
        wait_for_steps(process, runs[number], 5)
        process.send_signal(number)
    for number, process in processes.items():
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == codes[number], errors
        run = runs[number] / "runs" / "tiny"
        step = read_metrics(run / "metrics.jsonl")[-1]["step"]
        saved = run / "checkpoints" / str(step)
        assert 5 <= step < STEPS and find_damage(saved) is None
        line = f"dsv3 train: {number.name} after step {step}: saved to {saved}; the same command"
        assert line in errors
        assert "Traceback" not in errors
        run_here(runs[number])
        assert_same_run(runs[number], metrics)


def test_what_a_stopped_run_says_is_saved_is_saved(tmp_path, metrics, monkeypatch):
    """The signal comes while the loop makes up its mind whether step 2 is to be saved."""
    place = make_folder(tmp_path / "run")
    is_due = loop._is_due

    def interrupted_is_due(step: int, every: int) -> bool:
        if (step, every) == (2, 4):  # checkpoint_every
            os.kill(os.getpid(), signal.SIGTERM)
        return is_due(step, every)

    monkeypatch.setattr(loop, "_is_due", interrupted_is_due)
    with pytest.raises(Interrupted) as stop:
        run_here(place)
    assert stop.value.signal_number == signal.SIGTERM
    step = read_metrics(place / "runs" / "tiny" / "metrics.jsonl")[-1]["step"]
    saved = place / "runs" / "tiny" / "checkpoints" / str(step)
    assert f"saved to {saved};" in str(stop.value)
    assert find_damage(saved) is None
    monkeypatch.undo()
    run_here(place)
    assert_same_run(place, metrics)


def test_a_killed_run_goes_on_to_the_bit(folder, tmp_path, metrics):
    """kill -9 after any step but the last."""
    place = make_folder(tmp_path / "killed")
    process = start(place, 0.2)
    wait_for_steps(process, place, random.randint(1, STEPS - 3))
    process.kill()
    process.communicate()
    assert 1 <= steps_written(place) < STEPS
    run_here(place)
    assert_same_run(place, metrics)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_is_killed_all_the_time_goes_on_to_the_bit(tmp_path, metrics, seed, monkeypatch):
    """At moments of start-up, steps and saves, one a step; the first without a compile cache."""
    if seed == 0:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    place = make_folder(tmp_path / "killed")
    (place / "config.py").write_text(CONFIG.replace("checkpoint_every=4", "checkpoint_every=1"))
    generator = random.Random(seed)
    began = time.monotonic()
    process = start(place, 0.0)
    wait_for_steps(process, place, 1)
    start_up_seconds = time.monotonic() - began
    process.kill()
    process.communicate()
    for _ in range((3, 6)[seed]):
        process = start(place, 0.1)
        killed_at = time.monotonic() + start_up_seconds * generator.uniform(0.5, 1.3)
        enough = min(steps_written(place) + 2, STEPS - 2)  # on a machine that is faster by now
        while time.monotonic() < killed_at and steps_written(place) < enough:
            time.sleep(0.01)
        process.kill()
        errors = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, errors
    run_here(place)
    assert_same_run(place, metrics)


def run_command(folder: Path, *settings: str) -> int:
    """`dsv3 train config.py --set ...` in this process; its exit code."""
    flags = [word for setting in settings for word in ("--set", setting)]
    with contextlib.chdir(folder):
        return cli.main(["train", "config.py", *flags])


def test_a_run_of_another_model_is_refused(copied, capsys):
    before = (copied / "runs" / "tiny" / "config.json").read_bytes()
    assert run_command(copied, "model.hidden_size=64") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "runs/tiny holds a run with model.hidden_size = 32, expected 64" in line
    assert (copied / "runs" / "tiny" / "config.json").read_bytes() == before


def test_a_run_that_begins_from_another_has_its_weights_and_tokenizer(copied, metrics):
    """At a learning rate of 0 its evaluation is the other's last one, to the bit."""
    changes = ("train.name=second", "train.steps=1", "optimizer.peak_learning_rate=0")
    code = run_command(copied, "train.init_from=runs/tiny", "loss.bias_update_rate=0", *changes)
    assert code == 0
    runs = copied / "runs"
    first, second = (runs / name / "tokenizer.json" for name in ("tiny", "second"))
    assert second.read_bytes() == first.read_bytes()
    (step,) = read_metrics(runs / "second" / "metrics.jsonl")
    assert step["eval_loss"] == metrics[-1]["eval_loss"]


def test_another_model_than_that_of_init_from_is_refused(copied, capsys):
    changes = ("train.name=second", "train.init_from=runs/tiny")
    assert run_command(copied, *changes, "model.hidden_size=32", "model.num_hidden_layers=9") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--set model.num_hidden_layers is 9, expected " in line and "runs/tiny" in line
    assert not (copied / "runs" / "second").exists()


def test_a_run_begins_from_a_hugging_face_checkpoint(tmp_path):
    """Its model's config is the checkpoint's, and its first loss is Hugging Face's."""
    model, tensors, golden = load_golden("two_shared")
    make_folder(tmp_path / "run")
    np.save(tmp_path / "run" / "rows.npy", golden["tokens"])
    code = run_command(
        tmp_path / "run",
        f"train.init_from={GOLDEN / 'two_shared'}",
        *("data.source=tokens", "data.paths=rows.npy", "data.seq_len=24", "data.shuffle=false"),
        *("train.batch_size=2", "train.steps=2", "optimizer.warmup_steps=0"),
    )
    assert code == 0
    run = tmp_path / "run" / "runs" / "tiny"
    first, second = read_metrics(run / "metrics.jsonl")
    assert first["main_loss"] == pytest.approx(float(golden["loss_float64"]), rel=1e-5)
    assert second["main_loss"] < first["main_loss"]  # the same rows again
    written = json.loads((run / "config.json").read_text())
    assert written["model"]["n_shared_experts"] == 2
    assert written["model"]["num_hidden_layers"] == model.num_hidden_layers
    after = weights_after(tmp_path / "run", 2, from_dict(RunConfig, without_environment(written)))
    moved = max(np.abs(after[name] - tensors[name]).max() for name in after)
    assert 0 < moved < 0.03


def without_environment(config: dict) -> dict:
    return {key: value for key, value in config.items() if key != "environment"}


FIELDS = tiny_config()
ROWS_CONFIG = RunConfig(
    model=model_config(FIELDS),
    data=DataConfig(source="tokens", paths=("b.npy", "a.npy"), seq_len=12, shuffle=False),
    train=TrainConfig(name="rows", batch_size=4, steps=4),
    optimizer=OptimizerConfig(
        schedule="constant", peak_learning_rate=1e-2, warmup_steps=2, clip_norm=0.5
    ),
    loss=LossConfig(mtp_weight=0.3, balance_weight=0.01, bias_update_rate=0.01),
)


@pytest.fixture
def rows_folder(tmp_path, monkeypatch):
    """The current directory, in which `write_rows` puts the files of ROWS_CONFIG."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(folder: Path, rows: np.ndarray) -> None:
    np.save(folder / "b.npy", rows[:7].astype(np.int32))
    np.save(folder / "a.npy", rows[7:].astype(np.int32))


def test_losses_and_weights_of_a_run_are_the_oracles(rows_folder):
    """Rows in file order, from the first again after the last; each loss before its update."""
    rows = random_tokens(FIELDS, 10, 13)
    write_rows(rows_folder, rows)
    weights = oracle.random_weights(FIELDS, seed=8, std=0.3)
    run = rows_folder / train(ROWS_CONFIG, initial=model_of(ROWS_CONFIG, weights))

    state = None
    found = read_metrics(run / "metrics.jsonl")
    assert len(found) == 4
    for step, m in enumerate(found):
        batch = rows[np.arange(4 * step, 4 * step + 4) % 10]
        losses, gradients = oracle.loss_and_gradients(FIELDS, weights, batch, 0.3, 0.01)
        state = state or oracle.start_adamw(gradients)
        weights, state, norm = oracle.adamw_step(
            weights, gradients, state, learning_rate=(0.005, 0.01, 0.01, 0.01)[step], clip_norm=0.5
        )
        for layer, load in losses.load_by_layer.items():
            name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
            weights[name] = oracle.update_selection_bias(weights[name], load, 0.01)
        terms = (losses.loss, losses.main, losses.mtp, losses.balance)
        names = ("loss", "main_loss", "mtp_loss", "balance_loss")
        assert [m[name] for name in names] == pytest.approx(terms, rel=1e-4)
        assert m["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert m["expert_load"] == [losses.load_by_layer[layer].tolist() for layer in (1, 2)]
        assert "eval_loss" not in m
    for name, value in weights_after(rows_folder, 4, ROWS_CONFIG).items():
        np.testing.assert_allclose(value, weights[name], atol=2e-4, err_msg=name)


def test_a_nan_weight_is_named_and_the_exit_code_is_1(rows_folder, monkeypatch, capsys):
    """Through the command: the last thing it says is one line."""
    model = model_of(ROWS_CONFIG, oracle.random_weights(FIELDS, seed=8))
    model.norm.weight[...] = model.norm.weight[...].at[3].set(np.nan)
    monkeypatch.setattr(cli, "_initialise_from", lambda *_: (ROWS_CONFIG, model, None))
    make_folder(rows_folder / "run")
    write_rows(rows_folder / "run", random_tokens(FIELDS, 10, 13))
    assert run_command(rows_folder / "run", "train.init_from=a model") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dsv3 train: step 1: loss nan")
    assert line.endswith("first non-finite: weight norm.weight; no checkpoint yet")


def test_a_loss_that_is_not_finite_ends_the_run(rows_folder):
    """One token blows up layer 0; it comes in the second part of step 3.

    The batch ramps: step 1 has one part of two rows. Losses up to there are the oracle's.
    """
    fields = tiny_config(num_nextn_predict_layers=0)
    rows = random_tokens(fields, 12, 13) % 22
    rows[9, 5] = 22
    write_rows(rows_folder, rows)
    weights = oracle.random_weights(fields, seed=8, std=0.3)
    embedding = weights["model.embed_tokens.weight"]
    embedding[:, 0], embedding[22] = 0.0, 0.0
    embedding[22, 0] = 1.0
    weights["model.layers.0.self_attn.o_proj.weight"][:] = 0.0
    for projection in ("gate", "up"):  # other tokens get 0 here, and 0 for a gradient
        weight = weights[f"model.layers.0.mlp.{projection}_proj.weight"]
        weight[:, 0], weight[:, 1:] = 1e19, 0.0
    config = dataclasses.replace(
        ROWS_CONFIG,
        model=model_config(fields),
        train=TrainConfig(name="rows", batch_size=4, steps=5, accumulation=2, checkpoint_every=1),
        optimizer=OptimizerConfig(peak_learning_rate=0.0, warmup_steps=0, batch_ramp=True),
        loss=LossConfig(balance_weight=0.0, bias_update_rate=0.0),
    )
    with pytest.raises(NonFiniteError) as failure:
        train(config, initial=model_of(config, weights))
    message = str(failure.value)
    run = rows_folder / "runs" / "rows"
    assert message.startswith("step 3: loss nan")
    assert message.endswith(f"last good checkpoint: {run / 'checkpoints' / '2'}")
    found = read_metrics(run / "metrics.jsonl")
    assert [m["tokens_seen"] for m in found] == [2 * 12, 6 * 12]
    for m, batch in zip(found, (rows[:2], rows[2:6]), strict=True):
        expected = oracle.compute_losses(fields, weights, batch, 0.0, 0.0)
        assert m["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["1", "2"]
    assert "activations after layer 0" in message


@pytest.mark.slow
def test_python_stdlib_is_a_source(tmp_path):
    make_folder(tmp_path / "run")
    settings = ("data.source=python_stdlib", "data.eval_fraction=0.02", "model.vocab_size=512")
    assert run_command(tmp_path / "run", *settings) == 0
    run = tmp_path / "run" / "runs" / "tiny"
    found = read_metrics(run / "metrics.jsonl")
    assert found[0]["main_loss"] == pytest.approx(math.log(512), rel=0.01)
    assert found[-1]["eval_loss"] < math.log(512)
    tokenizer = load_tokenizer(run / "tokenizer.json", 512)
    assert tokenizer.vocab_size == 512
    assert len(tokenizer.encode("    return self")) < 8
