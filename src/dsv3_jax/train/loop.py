"""The training loop: data, steps, evaluation, checkpoints, and leaving in good order."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.config import RunConfig
from dsv3_jax.data.loader import Batch, Loader, PreparedData, prepare
from dsv3_jax.data.sources import gzip_bits_per_byte
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer
from dsv3_jax.model.accounting import count_flops, count_parameters
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.quant.recipe import make_recipe
from dsv3_jax.train.balance import max_over_mean
from dsv3_jax.train.diagnosis import NonFiniteError, broken_activations, first_non_finite
from dsv3_jax.train.layout import make_layout
from dsv3_jax.train.loss import evaluation_sums
from dsv3_jax.train.metrics import METRICS_FILE, MetricsWriter, ProgressDisplay, read_metrics
from dsv3_jax.train.plots import draw_run
from dsv3_jax.train.processes import any_process, ending_together, is_first
from dsv3_jax.train.run_directory import (
    CHECKPOINTS,
    PLOT_FILE,
    TOKENIZER_FILE,
    require_same_model,
    run_directory,
    write_config,
)
from dsv3_jax.train.scale_statistics import ScaleStatistics
from dsv3_jax.train.schedules import StepPlan, plan_run
from dsv3_jax.train.state import TrainState
from dsv3_jax.train.step import StepReport, StepSettings, make_train_step

LOAD_SAMPLES = 200
"""How many times over a run every expert's load and bias go into metrics.jsonl."""


class Interrupted(Exception):
    """The run was told to stop and has saved its state. `signal_number` says by what."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def train(
    config: RunConfig, *, initial: Transformer | None = None, tokenizer: Tokenizer | None = None
) -> Path:
    """Trains under runs/NAME, going on where an earlier call stopped; the run's directory.

    `initial` gives the first weights (its config is `config.model`), `tokenizer` what belongs to
    them. SIGTERM and SIGINT finish the step, save and raise `Interrupted`. A non-finite loss or
    gradient raises `NonFiniteError`. Bad input raises ValueError before the first step.
    """
    directory = run_directory(config)
    require_same_model(directory, config)
    with ExitStack() as stack:
        stopped_by = stack.enter_context(_stop_signals())
        manager = stack.enter_context(
            CheckpointManager(directory / CHECKPOINTS, config.train.keep_checkpoints)
        )
        stack.enter_context(ending_together())
        trainer = Trainer(config, directory, manager, initial, tokenizer)
        if trainer.first_step > config.train.steps:
            _say(f"{directory}: all {config.train.steps} steps are done")
            return directory
        writer = progress = None
        if is_first():
            resumed_from = trainer.first_step - 1 if trainer.first_step > 1 else None
            writer = stack.enter_context(MetricsWriter(directory, resumed_from))
            progress = stack.enter_context(
                ProgressDisplay(config.train.steps, first_step=trainer.first_step)
            )
        trainer.run(RunOutput(writer, progress), stopped_by)
    if is_first():
        draw_run(read_metrics(directory / METRICS_FILE), directory / PLOT_FILE)
    _say(f"{directory}: metrics.jsonl, {PLOT_FILE}, {CHECKPOINTS}/{config.train.steps}")
    return directory


@dataclass(frozen=True)
class RunOutput:
    """Where a run's numbers and messages go; nowhere in processes other than the first."""

    writer: MetricsWriter | None
    progress: ProgressDisplay | None

    def metrics(self, step: int, metrics: dict[str, Any]) -> None:
        if self.writer is not None and self.progress is not None:
            self.writer.write(metrics)
            self.progress.update(step, metrics["loss"], metrics["tokens_per_second"])

    def message(self, text: str) -> None:
        if self.progress is not None:
            self.progress.message(text)


def _say(text: str) -> None:
    if is_first():
        print(text)


class Trainer:
    """One run on this process: its state, its data and its compiled step."""

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        manager: CheckpointManager,
        initial: Transformer | None,
        tokenizer: Tokenizer | None,
    ):
        self.config = config
        self.directory = directory
        self.manager = manager
        self.plans = plan_run(config.train, config.optimizer, config.loss, config.parts)
        self.data = _prepare_data(config, directory, tokenizer)
        self.layout = make_layout(config)
        share, self.data_shares = self.layout.data_share()
        self.loader = Loader(
            self.data, config.train.batch_size, config.train.seed, share, self.data_shares
        )
        self.state, self.first_step = self._initial_state(initial)
        self.evaluation_sums = self.layout.sum_over_tokens(evaluation_sums)
        recipe = make_recipe(config.precision.recipe, config.precision.rules)
        self.scale_statistics = ScaleStatistics(self.layout, recipe) if recipe.rules else None
        self.eval_batches: list[Batch] = []
        if len(self.data.held_out_rows) >= config.train.batch_size:
            self.eval_batches = self.loader.eval_batches(config.train.eval_batches)
        if is_first():
            write_config(directory, config)
            if self.data.tokenizer is not None:
                self.data.tokenizer.save(directory / TOKENIZER_FILE)
        _say(self._introduction())

    def run(self, output: RunOutput, stopped_by: list[int]) -> None:
        """Every step that is left, with evaluations and checkpoints between."""
        step_function = self._compile(output)
        train = self.config.train
        for plan in self.plans[self.first_step - 1 :]:
            started = time.perf_counter()
            rows, documents = self._next_rows(plan)
            self.state, report = step_function(self.state, rows, documents, _settings(plan))
            finite = bool(report.finite)  # waits for the step
            if not finite:
                raise NonFiniteError(self._explain(plan.step, rows, report))
            metrics = self._metrics(plan, report, time.perf_counter() - started)
            last = plan.step == train.steps
            evaluates = last or _is_due(plan.step, train.eval_every)
            if evaluates and self.scale_statistics is not None:
                part = rows[0], None if documents is None else documents[0]
                metrics |= self.scale_statistics(self.state, *part, plan.mtp_weight)
            if evaluates and self.eval_batches:
                metrics |= self._evaluate()
                output.message(_describe_evaluation(plan.step, metrics))
            output.metrics(plan.step, metrics)
            stop = any_process(bool(stopped_by))  # read once: a signal may come at any moment
            if last or stop or _is_due(plan.step, train.checkpoint_every):
                self._save(plan.step)
            if stop and not last:
                self.manager.wait()
                number = stopped_by[0] if stopped_by else signal.SIGTERM  # another process's
                saved = self.manager.step_directory(plan.step)
                raise Interrupted(
                    f"{signal.Signals(number).name} after step {plan.step}: saved to {saved};"
                    " the same command goes on",
                    number,
                )
        if self.data.held_out and self.eval_batches:
            gzip = gzip_bits_per_byte(self.data.held_out)
            output.message(f"gzip -9 of the held-out files: {gzip:.3f} bits per byte")

    def _initial_state(self, initial: Transformer | None) -> tuple[TrainState, int]:
        """State and first step: restored, with the weights of `initial`, or initialised."""
        restored = self.manager.restore(self.layout.abstract_state())
        if restored is None:
            return self.layout.initial_state(initial), 1
        self.loader.set_state(restored.metadata["data"])
        return restored.state, restored.step + 1

    def _compile(self, output: RunOutput):
        """The step for this run's shapes, compiled before the clock starts."""
        started = time.perf_counter()
        position = self.loader.get_state()
        plan = self.plans[self.first_step - 1]
        rows, documents = self._next_rows(plan)
        self.loader.set_state(position)
        step = make_train_step(self.layout)
        compiled = step.lower(self.state, rows, documents, _settings(plan)).compile()
        output.message(f"compiled in {time.perf_counter() - started:.1f} s")
        return compiled

    def _next_rows(self, plan: StepPlan) -> tuple[jax.Array, jax.Array | None]:
        """The step's rows, [parts, part, seq + 1], parts beyond the ramp's left zero."""
        parts = self.config.parts
        part = self.config.train.batch_size // parts
        batch = self.loader.next_batch(plan.micro_batches * part)
        mine = part // self.data_shares

        def arrange(array):
            padded = np.zeros((parts * mine, array.shape[1]), np.int32)
            padded[: len(array)] = array
            return self.layout.put_rows(padded.reshape(parts, mine, -1))

        documents = None if batch.documents is None else arrange(batch.documents)
        return arrange(batch.tokens), documents

    def _metrics(self, plan: StepPlan, report: StepReport, seconds: float) -> dict[str, Any]:
        train, seq = self.config.train, self.config.data.seq_len
        sequences = plan.micro_batches * (train.batch_size // self.config.parts)
        tokens = sequences * seq
        metrics: dict[str, Any] = {
            "step": plan.step,
            "tokens_seen": (plan.sequences_before + sequences) * seq,
            **{name: float(value) for name, value in report.losses._asdict().items()},
            "grad_norm": float(report.gradient_norm.total),
            "learning_rate": plan.learning_rate,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "expert_load_max_over_mean": 1.0,
        }
        if report.load.size:
            metrics["expert_load_max_over_mean"] = float(max_over_mean(report.load))
            every = -(-train.steps // LOAD_SAMPLES)
            if plan.step == 1 or plan.step % every == 0 or plan.step == train.steps:
                metrics["expert_load"] = np.asarray(report.load)
                biases = jax.tree.leaves(self.state.selection_bias)
                if biases:
                    metrics["router_bias"] = np.concatenate([np.asarray(b) for b in biases])
        return metrics

    def _evaluate(self) -> dict[str, float]:
        """Loss and bits per byte of the held-out batches."""
        tokenizer = self.data.tokenizer
        token_bytes = np.zeros((self.config.model.vocab_size,), np.int32)
        if tokenizer is not None:
            known = tokenizer.token_bytes()
            token_bytes[: len(known)] = known
        sums = np.zeros(3)
        for batch in self.eval_batches:
            documents = None if batch.documents is None else self._put_batch(batch.documents)
            rows = self._put_batch(batch.tokens)
            sums += self.evaluation_sums(self.state, rows, documents, token_bytes)
        nll, predictions, byte_count = sums
        result = {"eval_loss": float(nll / predictions)}
        if byte_count > 0:
            result["eval_bits_per_byte"] = float(nll / math.log(2) / byte_count)
        return result

    def _put_batch(self, array: np.ndarray) -> jax.Array:
        return self.layout.put_rows(array[None])[0]

    def _save(self, step: int) -> None:
        self.manager.save(step, self.state, {"step": step, "data": self.loader.get_state()})

    def _explain(self, step: int, rows: jax.Array, report: StepReport) -> str:
        look = self.layout.sum_over_tokens(
            lambda model, part, _: broken_activations(model, part).astype(jnp.int32)
        )
        # Parts beyond a ramp's are tokens too, all 0.
        counts = [np.asarray(look(self.state, part, None)) for part in rows]
        squares = report.gradient_norm.squares
        where = first_non_finite(
            self.config.model, self.state.params, np.sum(counts, axis=0) > 0, squares
        )
        self.manager.wait()  # a save in flight may be the last good one
        good = self.manager.latest()
        checkpoint = (
            f"last good checkpoint: {self.manager.step_directory(good)}"
            if good is not None
            else "no checkpoint yet"
        )
        return (
            f"step {step}: loss {float(report.losses.loss)}, gradient norm"
            f" {float(report.gradient_norm.total)}; first non-finite: {where}; {checkpoint}"
        )

    def _introduction(self) -> str:
        config = self.config
        parameters = count_parameters(config.model)
        flops = count_flops(config.model, config.data.seq_len).training
        rows = sum(len(part) for part in self.data.rows)
        begin = f", going on after step {self.first_step - 1}" if self.first_step > 1 else ""
        return (
            f"{self.directory}: {parameters.total + parameters.mtp:,} parameters"
            f" ({parameters.active + parameters.mtp_active:,} active),"
            f" {flops / 1e6:,.4g} MFLOP a token, {rows:,} rows of {config.data.seq_len} tokens,"
            f" {config.train.steps} steps of {config.train.batch_size}{begin}"
        )


def _prepare_data(config: RunConfig, directory: Path, tokenizer: Tokenizer | None) -> PreparedData:
    """The run's data; a run that goes on keeps the tokenizer it began with."""
    saved = directory / TOKENIZER_FILE
    if saved.is_file() and (directory / CHECKPOINTS).is_dir():
        tokenizer = load_tokenizer(saved, config.model.vocab_size)
    return prepare(config.data, config.model.vocab_size, config.train.seed, tokenizer)


def _settings(plan: StepPlan) -> StepSettings:
    """As NumPy scalars, which every process hands in alike."""
    settings: Any = StepSettings
    return settings(
        np.int32(plan.micro_batches),
        np.float32(plan.learning_rate),
        np.float32(plan.mtp_weight),
        np.float32(plan.bias_update_rate),
    )


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _describe_evaluation(step: int, metrics: dict[str, Any]) -> str:
    text = f"step {step}: held-out loss {metrics['eval_loss']:.4f}"
    if "eval_bits_per_byte" in metrics:
        text += f", {metrics['eval_bits_per_byte']:.3f} bits per byte"
    return text


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list to which SIGTERM and SIGINT append their number instead of ending the process."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        del frame
        received.append(number)

    previous = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
