"""A whole run: every section, the file it is read from, and `--set section.field=value`."""

import dataclasses
import importlib.util
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_jax.config.checks import require
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.config.serving import ServeConfig
from dsv3_jax.config.training import (
    DataConfig,
    LossConfig,
    OptimizerConfig,
    PrecisionConfig,
    TrainConfig,
)

TILE = 128
"""Channels that share a scale in FP8 and in LogFMT."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, of a training or a server. Layers and stages receive only their own section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)

    def __post_init__(self):
        require(
            self.data.seq_len <= self.model.max_position_embeddings,
            "data.seq_len",
            self.data.seq_len,
            f"at most model.max_position_embeddings = {self.model.max_position_embeddings}",
        )
        require(
            self.data.seq_len > self.model.num_nextn_predict_layers,
            "data.seq_len",
            self.data.seq_len,
            f"more than model.num_nextn_predict_layers = {self.model.num_nextn_predict_layers}",
        )
        if self.serve.unit is None:
            experts, name = self.model.n_routed_experts, "model.n_routed_experts"
            self._check_parts()
        else:
            experts = self.model.n_routed_experts + self.serve.redundant_experts
            name = "model.n_routed_experts + serve.redundant_experts"
        expert_devices = self.parallel.node * self.parallel.gpu
        require(
            not self.model.has_experts or experts % expert_devices == 0,
            "parallel.node x gpu",
            expert_devices,
            f"a divisor of {name} = {experts}",
        )
        self._check_tiles()

    def _check_tiles(self) -> None:
        """Checks that no tile of 128 channels, which has one scale, is cut."""
        model, precision = self.model, self.precision
        is_fp8 = precision.recipe == "fp8"
        widths = {"model.hidden_size": model.hidden_size}
        if is_fp8:
            name = "model.num_attention_heads x v_head_dim"
            values = model.num_attention_heads * model.v_head_dim
            rule = "an even number: FP8 keeps o_proj's input in E5M6, two values in three bytes"
            require(values % 2 == 0, name, values, rule)
            widths |= {
                "model.q_lora_rank": model.q_lora_rank or 0,
                "model.kv_lora_rank": model.kv_lora_rank,
                name: values,
            }
            if model.num_dense_layers:
                widths["model.intermediate_size"] = model.intermediate_size
        if is_fp8 or precision.dispatch_format == "fp8":
            rule = f"a multiple of {TILE}, or less: FP8 has one scale for {TILE} channels"
            for name, width in widths.items():
                require(width < TILE or width % TILE == 0, name, width, rule)
        if is_fp8 and model.has_experts:
            width = model.moe_intermediate_size
            rule = f"a multiple of {TILE}: with FP8 gate and up share blocks of {TILE} rows"
            require(width % TILE == 0, "model.moe_intermediate_size", width, rule)
        if precision.combine != "bf16":
            rule = f"a multiple of {TILE} where precision.combine is {precision.combine}"
            width = model.hidden_size
            require(width % TILE == 0, "model.hidden_size", width, rule)

    def _check_parts(self) -> None:
        """Checks that batch and layers divide as the mesh needs."""
        may_keep = self.parallel.pipe > 1 or self.train.remat == "full"
        rule = "none, or train.remat=full, or a pipeline"
        require(not self.train.keep or may_keep, "train.keep", self.train.keep, rule)
        parallel, batch = self.parallel, self.train.batch_size
        parts_field = "train.accumulation"
        if parallel.pipe > 1:
            rule = "1 where parallel.pipe is above 1 (parallel.micro_batches splits the batch)"
            require(self.train.accumulation == 1, parts_field, self.train.accumulation, rule)
            parts_field = "parallel.micro_batches"
            rule = f"a divisor of train.batch_size = {batch}"
            require(batch % parallel.micro_batches == 0, parts_field, parallel.micro_batches, rule)
            # All MTP modules are in the last stage, which needs no other layer.
            layers = self.model.num_hidden_layers + min(self.model.num_nextn_predict_layers, 1)
            require(
                parallel.stages <= layers,
                f"parallel.pipe = {parallel.pipe}: {parallel.stages} stages",
                parallel.stages,
                f"at most {layers}, the model's layers and MTP modules",
            )
        part, shards = batch // self.parts, parallel.token_shards
        require(
            part % shards == 0,
            f"train.batch_size / {parts_field}",
            part,
            f"a multiple of parallel.data x node x gpu = {shards}, over which sequences are split",
        )

    def check_is_training(self) -> None:
        """ValueError for the config of a serving unit, which describes no training."""
        rule = "None: a unit's config is for `dsv3 compile`"
        require(self.serve.unit is None, "serve.unit", self.serve.unit, rule)

    @property
    def parts(self) -> int:
        """Parts in which a batch is computed: of an accumulation, or a pipeline's micro-batches."""
        pipeline = self.parallel.pipe > 1
        return self.parallel.micro_batches if pipeline else self.train.accumulation


def read_config(path: str | Path) -> RunConfig:
    """The RunConfig that the Python file at `path` returns from its `config()`.

    Raises ValueError naming the file when it is missing, fails to run or returns something else.
    """
    path = Path(path)
    require(path.is_file(), "CONFIG", str(path), "a Python file with `def config() -> RunConfig`")
    spec = importlib.util.spec_from_file_location(f"dsv3_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"CONFIG is {str(path)!r}, expected a file whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        result = module.config()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{path}: {type(error).__name__}: {error}, expected a file with"
            " `def config() -> RunConfig`"
        ) from error
    require(isinstance(result, RunConfig), f"{path}: config()", type(result), "a RunConfig")
    return result


def apply_overrides[Sections](config: Sections, assignments: list[str]) -> Sections:
    """`config`, of a run or a server, with every `section.field=value` applied, values read by the
    field's type.

    All assignments are applied before the sections are checked, so that two fields that depend on
    each other can be set together. `a,b` fills a tuple; `none` clears an optional field.

    >>> apply_overrides(RunConfig(), ["train.steps=20"]).train.steps
    20
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        require(equals == "=", "--set", assignment, "section.field=value")
        _assign(config, key.strip().split("."), text.strip(), key.strip(), changes)
    return _rebuild(config, changes)


def from_dict(kind: type, values: Any, name: str = "config") -> Any:
    """The dataclass `kind` from nested dicts, as written by `to_dict`.

    Raises ValueError for a key that `kind` has not, by its full dotted name, and for one it lacks.
    """
    require(isinstance(values, dict), name, values, "an object")
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    for key in values:
        require(key in known, f"{name}.{key}", values[key], f"one of {', '.join(sorted(known))}")
    missing = _missing_fields(kind, values)
    require(not missing, name, values, f"{', '.join(missing)} as well")
    return kind(**{k: _from_json(hints[k], v, f"{name}.{k}") for k, v in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts of any section or of the whole run, ready for JSON."""
    return dataclasses.asdict(config)


def _assign(config: Any, keys: list[str], text: str, full: str, changes: dict[str, Any]) -> None:
    names = [f.name for f in dataclasses.fields(config)]
    require(keys[0] in names, f"--set {full}", keys[0], "one of " + ", ".join(sorted(names)))
    hint = typing.get_type_hints(type(config))[keys[0]]
    if len(keys) == 1:
        section = _section_of(hint)
        cleared = text.lower() == "none" and _is_optional(hint)
        require(
            section is None or cleared,
            f"--set {full}",
            text,
            "a field of this section: " + full + ".FIELD=value",
        )
        changes[keys[0]] = _parse(hint, text, full)
        return
    section = _section_of(hint)
    if section is None:
        raise ValueError(f"--set {full} is {text!r}, expected no '.': {keys[0]} is a value")
    inner = changes.setdefault(keys[0], {})
    require(isinstance(inner, dict), f"--set {full}", text, f"{keys[0]} not set to a value before")
    current = getattr(config, keys[0])
    if current is None:  # an optional section that the config leaves out: check names by its type
        fields = {f.name: f for f in dataclasses.fields(section)}
        require(keys[1] in fields, f"--set {full}", keys[1], "one of " + ", ".join(sorted(fields)))
        require(len(keys) == 2, f"--set {full}", text, f"no '.': {keys[1]} is a value")
        inner[keys[1]] = _parse(typing.get_type_hints(section)[keys[1]], text, full)
    else:
        _assign(current, keys[1:], text, full, inner)


def _rebuild(config: Any, changes: dict[str, Any], prefix: str = "") -> Any:
    hints = typing.get_type_hints(type(config))
    values = {}
    for key, change in changes.items():
        if isinstance(change, dict):
            current = getattr(config, key)
            if current is None:
                section = _section_of(hints[key])
                assert section is not None  # _assign went into it
                missing, full = _missing_fields(section, change), prefix + key
                expected = ", ".join(f"{full}.{name}" for name in missing)
                require(not missing, f"--set {full}", change, f"{expected} as well")
                change = section(**change)
            else:
                change = _rebuild(current, change, f"{prefix}{key}.")
        values[key] = change
    return dataclasses.replace(config, **values)


def _missing_fields(kind: type, given: dict[str, Any]) -> list[str]:
    """Fields of the dataclass `kind` that have no default and are not in `given`."""
    no_default = dataclasses.MISSING
    return [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is no_default and f.default_factory is no_default and f.name not in given
    ]


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return typing.get_args(hint)
    return (hint,)


def _is_optional(hint: Any) -> bool:
    return type(None) in _options(hint)


def _tuple_of(hint: Any) -> Any:
    """The type of the items of the tuple among the members of a union, None without one."""
    tuples = (o for o in _options(hint) if typing.get_origin(o) is tuple)
    return next((typing.get_args(o)[0] for o in tuples), None)


def _section_of(hint: Any) -> Any:
    """The dataclass among the members of a union, None without one."""
    return next((o for o in _options(hint) if dataclasses.is_dataclass(o)), None)


def _parse(hint: Any, text: str, full: str) -> Any:
    if _is_optional(hint) and text.lower() in ("none", "null"):
        return None
    kind = next(o for o in _options(hint) if o is not type(None))
    if kind is bool:
        truth = {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
        require(truth is not None, f"--set {full}", text, "true or false")
        return truth
    several = _tuple_of(hint)
    if several is int and (kind is not int or "," in text):
        return tuple(_parse(int, part, full) for part in text.split(",") if part)
    if kind is int or kind is float:
        expected = "an integer" if kind is int else "a number"
        try:
            return kind(text.replace("_", ""))
        except ValueError:
            raise ValueError(f"--set {full} is {text!r}, expected {expected}") from None
    if kind is str:
        return text
    if several is str:
        return tuple(part for part in text.split(",") if part)
    raise ValueError(f"--set {full} is {text!r}, expected this field to be set in the config file")


def _from_json(hint: Any, value: Any, name: str) -> Any:
    if value is None:
        require(_is_optional(hint), name, value, "a value")
        return None
    section = _section_of(hint)
    if section is not None:
        return from_dict(section, value, name)
    kind, item = next(o for o in _options(hint) if o is not type(None)), _tuple_of(hint)
    if item is not None and (isinstance(value, list | tuple) or typing.get_origin(kind) is tuple):
        require(isinstance(value, list | tuple), name, value, "a list")
        return tuple(_from_json(item, v, name) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    exact = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    require(exact, name, value, f"a value of type {kind.__name__}")
    return value
