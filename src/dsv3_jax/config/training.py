"""The training sections: data, train, optimizer, loss and precision."""

import math
from dataclasses import dataclass

from dsv3_jax.config.checks import require, require_at_least, require_one_of, require_types

DATA_SOURCES = ("python_stdlib", "text", "jsonl", "parquet", "tokens")


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One of several weighted sources of `data.mixture`. `weight` is a share, not normalised."""

    source: str
    paths: tuple[str, ...] = ()
    weight: float = 1.0

    def __post_init__(self):
        require_types("data.mixture", self)
        check_source("data.mixture.source", self.source, self.paths)
        holds = 0 < self.weight < math.inf
        require(holds, "data.mixture.weight", self.weight, "a positive number")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from and how they are packed.

    `source` and `paths` (globs) name one source; `mixture` several, and then `source` is not used.
    `tokenizer` is a path to a tokenizer.json; None trains a byte-level BPE of `model.vocab_size` on
    the source. Rows hold `seq_len + 1` tokens: `seq_len` inputs and their next tokens.
    `fim_rate` is the share of documents rearranged to prefix-suffix-middle. With
    `cross_document_mask` a token attends only to its own document and no loss crosses documents.
    `eval_fraction` of the documents, chosen by a hash of their name, are held out.
    """

    source: str = "python_stdlib"
    paths: tuple[str, ...] = ()
    mixture: tuple[DataSource, ...] = ()
    tokenizer: str | None = None
    seq_len: int = 4096
    shuffle: bool = True
    fim_rate: float = 0.0
    cross_document_mask: bool = False
    eval_fraction: float = 0.02
    eval_paths: tuple[str, ...] = ()
    text_field: str = "text"

    def __post_init__(self):
        require_types("data", self)
        if not self.mixture:
            check_source("data.source", self.source, self.paths)
        kinds = {part.source for part in self.mixture}
        require(
            kinds <= {"tokens"} or "tokens" not in kinds,
            "data.mixture",
            sorted(kinds),
            "token arrays alone or text sources alone, not both in one mixture",
        )
        require_at_least("data", self, 2, "seq_len")
        require(0 <= self.fim_rate <= 1, "data.fim_rate", self.fim_rate, "a number from 0 to 1")
        require(
            0 <= self.eval_fraction < 1,
            "data.eval_fraction",
            self.eval_fraction,
            "a number from 0 to below 1",
        )

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The weighted sources, whichever way they were given."""
        return self.mixture or (DataSource(source=self.source, paths=self.paths),)

    @property
    def has_text(self) -> bool:
        """Whether the sources are text, which needs a tokenizer."""
        return self.sources[0].source != "tokens"


def check_source(field: str, source: str, paths: tuple[str, ...]) -> None:
    """Raises ValueError for an unknown kind of source or one that lacks its paths."""
    require_one_of(field, source, *DATA_SOURCES)
    if source != "python_stdlib":
        require(len(paths) > 0, f"{field} {source!r}: paths", paths, "at least one path or glob")


TENSORS = (
    "q_latent",
    "kv_latent",
    "queries",
    "keys_values",
    "attention_output",
    "attention_residual",
    "chosen_experts",
    "node_rows",
    "node_experts",
    "gpu_rows",
    "gpu_experts",
    "expert_rows",
    "expert_up",
    "mlp_gate",
    "mlp_up",
)
"""Names of a layer's tensors in its order: outputs of q_a_proj, kv_a_proj_with_mqa, q_b_proj,
kv_b_proj; the heads' outputs; x after attention; the router's choice; what came over the node and
the gpu hop; the experts' inputs and what SwiGLU reads; the same of the shared experts."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: its name under runs/, length, batch, evaluation and checkpoints.

    `batch_size` is in sequences and is what one optimizer step sees; it is computed in
    `accumulation` equal parts. `remat` recomputes in backward: `none`, `selective` (RMSNorm and
    MLA up-projections, as published; in a pipeline also the copies of rows that experts read) or
    `full` (whole layers), and `keep` names tensors that `full`, or any `remat` in a pipeline, keeps
    nevertheless: some of `TENSORS`. `scan_layers=False` unrolls the
    layers: about a tenth faster on CPU, compile time then grows with depth.
    """

    name: str = "run"
    steps: int = 1000
    batch_size: int = 8
    accumulation: int = 1
    seed: int = 0
    init_from: str | None = None
    eval_every: int = 0
    eval_batches: int = 16
    checkpoint_every: int = 0
    keep_checkpoints: int = 3
    remat: str = "none"
    keep: tuple[str, ...] = ()
    scan_layers: bool = True

    def __post_init__(self):
        require_types("train", self)
        require_at_least("train", self, 1, "steps", "batch_size", "accumulation", "eval_batches")
        require_at_least("train", self, 1, "keep_checkpoints")
        require_at_least("train", self, 0, "seed", "eval_every", "checkpoint_every")
        require(self.seed < 2**32, "train.seed", self.seed, "a number below 2**32")
        require(
            self.name != "" and "/" not in self.name and not self.name.startswith("."),
            "train.name",
            self.name,
            "a folder name without '/' and not starting with '.'",
        )
        require(
            self.batch_size % self.accumulation == 0,
            "train.accumulation",
            self.accumulation,
            f"a divisor of train.batch_size = {self.batch_size}",
        )
        require_one_of("train.remat", self.remat, "none", "selective", "full")
        for name in self.keep:
            require_one_of("train.keep", name, *TENSORS)

    @property
    def kept(self) -> frozenset[str]:
        """`keep`, and with attention's output the log-sum-exp of its scores, which backward reads
        beside it."""
        beside = {"attention_lse"} if "attention_output" in self.keep else set()
        return frozenset(self.keep) | beside


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the learning rate.

    `schedule="constant"` warms up linearly over `warmup_steps` and then stays at
    `peak_learning_rate`. `published` follows the report's five phases, each a share of the run's
    tokens: warm-up, constant, cosine to a tenth, constant, and a last constant of 7.3/220.
    `batch_ramp=True` raises the batch from a fifth of `train.batch_size` over the first
    469/14,800 of the tokens, as published.

    Source: DeepSeek-V3 Technical Report §4.2.
    """

    schedule: str = "published"
    peak_learning_rate: float = 2.2e-4
    warmup_steps: int = 2000
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    moment_dtype: str = "float32"
    batch_ramp: bool = False

    def __post_init__(self):
        require_types("optimizer", self)
        require_one_of("optimizer.schedule", self.schedule, "published", "constant")
        require_one_of("optimizer.moment_dtype", self.moment_dtype, "float32", "bfloat16")
        require_at_least("optimizer", self, 0, "warmup_steps", "weight_decay", "peak_learning_rate")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "a number from 0 to below 1")
        for name in ("eps", "clip_norm"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"optimizer.{name}", value, "a positive number")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """loss = main + mtp_weight * mtp + balance_weight * balance, and the selection bias's speed.

    None takes the published schedule over the run's tokens: `mtp_weight` 0.3, then 0.1 for the
    last 4.8/14.8; `bias_update_rate` 0.001, then 0 for the last 0.5/14.8.

    Source: DeepSeek-V3 Technical Report §4.2.
    """

    mtp_weight: float | None = None
    balance_weight: float = 0.0001
    bias_update_rate: float | None = None

    def __post_init__(self):
        require_types("loss", self)
        for name in ("mtp_weight", "balance_weight", "bias_update_rate"):
            value = getattr(self, name)
            holds = value is None or 0 <= value < math.inf
            require(holds, f"loss.{name}", value, "a number of at least 0")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """What the step computes in, and what travels between the experts' devices.

    `recipe` is `fp32`, `bf16`, or `fp8`, the published one: products in E4M3 with a scale for each
    1x128 or 128x128, FP32 sums, the rest in BF16; master weights, router, norms and embedding are
    FP32 in all. `dispatch` sends rows to the experts, and gradients in combine's backward, as `fp8`
    or as they are, `bf16`; None is what the recipe publishes. `combine` sends sums back, as they
    are or as `logfmt10` or `logfmt8`. One device rounds as the wire would. `rules` other than
    `published` are what the papers argue against (quant/recipe.py).
    """

    recipe: str = "fp32"
    dispatch: str | None = None
    combine: str = "bf16"
    rules: str = "published"

    def __post_init__(self):
        require_types("precision", self)
        require_one_of("precision.recipe", self.recipe, "fp32", "bf16", "fp8")
        if self.dispatch is not None:
            require_one_of("precision.dispatch", self.dispatch, "bf16", "fp8")
        require_one_of("precision.combine", self.combine, "bf16", "logfmt10", "logfmt8")
        rules = "published", "per_tensor_scales", "block_gradients", "e5m2_gradients"
        require_one_of("precision.rules", self.rules, *rules)
        rule = "published where precision.recipe is not fp8"
        published = self.rules == "published" or self.recipe == "fp8"
        require(published, "precision.rules", self.rules, rule)

    @property
    def dispatch_format(self) -> str:
        """`dispatch`, or what the recipe has for it."""
        return self.dispatch or ("fp8" if self.recipe == "fp8" else "bf16")
