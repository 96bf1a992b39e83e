"""A run's config: its file, `--set`, dictionaries, and what spans sections."""

import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import (
    DataConfig,
    DataSource,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
    YarnConfig,
    apply_overrides,
    from_dict,
    read_config,
    to_dict,
)

ROOT = Path(__file__).resolve().parents[2]
CONFIG_FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/*.py"))
SECTIONS = ("model", "parallel", "data", "train", "optimizer", "loss", "precision", "serve")
EXTENDED = RunConfig(model=ModelConfig(rope_scaling=YarnConfig(factor=40.0)))
CONFIG_RULE = "a Python file with `def config() -> RunConfig`"


def changed(*assignments: str, config: RunConfig = RunConfig()) -> RunConfig:  # noqa: B008
    return apply_overrides(config, list(assignments))


# What --set reads


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("train.steps=20", 20),
        ("train.steps=1_000_000", 1_000_000),
        (" train.steps = 20 ", 20),
        ("optimizer.peak_learning_rate=1e-3", 1e-3),
        ("optimizer.peak_learning_rate=1", 1.0),
        ("optimizer.peak_learning_rate=1_0.5", 10.5),
        ("data.shuffle=false", False),
        ("data.shuffle=False", False),
        ("data.shuffle=0", False),
        ("data.cross_document_mask=TRUE", True),
        ("data.cross_document_mask=1", True),
        ("train.name=second try", "second try"),
        ("train.name=a=b", "a=b"),
        ("data.eval_paths=a.txt,b/*.txt", ("a.txt", "b/*.txt")),
        ("data.eval_paths=a.txt", ("a.txt",)),
        ("data.eval_paths=", ()),
        ("data.eval_paths=a.txt,", ("a.txt",)),
        ("train.init_from=runs/a", "runs/a"),
        ("train.init_from=none", None),
        ("model.q_lora_rank=None", None),
        ("model.q_lora_rank=null", None),
        ("model.q_lora_rank=96", 96),
        ("loss.mtp_weight=0.5", 0.5),
        ("train.name=none", "none"),  # not optional: a text
    ],
)
def test_set_reads_by_type(assignment, value):
    section, field = assignment.split("=")[0].strip().split(".")
    found = getattr(getattr(changed(assignment), section), field)
    assert found == value
    assert type(found) is type(value)


def test_set_leaves_the_rest_alone():
    assert changed() == RunConfig()
    config = changed("train.steps=20")
    assert config == dataclasses.replace(RunConfig(), train=TrainConfig(steps=20))


def test_set_twice_takes_the_last():
    assert changed("train.steps=20", "train.seed=1", "train.steps=30").train.steps == 30


def test_set_makes_an_optional_section():
    config = changed("model.rope_scaling.factor=40", "model.rope_scaling.beta_fast=16")
    assert config.model.rope_scaling == YarnConfig(factor=40.0, beta_fast=16.0)


def test_set_changes_an_existing_section():
    config = changed("model.rope_scaling.beta_fast=16", config=EXTENDED)
    assert config.model.rope_scaling == YarnConfig(factor=40.0, beta_fast=16.0)


def test_set_clears_an_optional_section():
    assert changed("model.rope_scaling=none", config=EXTENDED) == RunConfig()


def test_set_checks_after_all_are_applied():
    """Each of these alone is refused."""
    config = changed("model.n_routed_experts=16", "model.n_group=2", "model.topk_group=2")
    assert (config.model.n_routed_experts, config.model.n_group) == (16, 2)
    config = changed("data.seq_len=8192", "model.max_position_embeddings=8192")
    assert config.data.seq_len == 8192
    config = changed("data.paths=a.txt", "data.source=text")
    assert config.data.paths == ("a.txt",)


@pytest.mark.parametrize(
    ("assignments", "name", "value", "rule"),
    [
        (["train.steps"], "--set", "train.steps", "section.field=value"),
        ([""], "--set", "", "section.field=value"),
        (["trian.steps=2"], "--set trian.steps", "trian", "one of data, loss, model, optimizer"),
        (["train.stepz=2"], "--set train.stepz", "stepz", "one of accumulation, batch_size"),
        (["steps=2"], "--set steps", "steps", "one of data, loss, model"),
        (["=2"], "--set ", "", "one of data, loss, model"),
        (["train.=2"], "--set train.", "", "one of accumulation"),
        (["train=2"], "--set train", "2", "a field of this section: train.FIELD=value"),
        (["train=none"], "--set train", "none", "a field of this section: train.FIELD=value"),
        (["train.steps.x=2"], "--set train.steps.x", "2", "no '.': steps is a value"),
        (["train.steps=many"], "--set train.steps", "many", "an integer"),
        (["train.steps=2.5"], "--set train.steps", "2.5", "an integer"),
        (["train.steps=1e3"], "--set train.steps", "1e3", "an integer"),
        (["train.steps="], "--set train.steps", "", "an integer"),
        (["train.steps=none"], "--set train.steps", "none", "an integer"),
        (["optimizer.eps=tiny"], "--set optimizer.eps", "tiny", "a number"),
        (["data.shuffle=maybe"], "--set data.shuffle", "maybe", "true or false"),
        (["data.mixture=text"], "--set data.mixture", "text", "to be set in the config file"),
        (["train.steps=0"], "train.steps", 0, "a number of at least 1"),
        (
            ["model.rope_scaling=4"],
            "--set model.rope_scaling",
            "4",
            "model.rope_scaling.FIELD=value",
        ),
        (
            ["model.rope_scaling.speed=4"],
            "--set model.rope_scaling.speed",
            "speed",
            "one of beta_fast, beta_slow, factor",
        ),
        (
            ["model.rope_scaling.factor.x=4"],
            "--set model.rope_scaling.factor.x",
            "4",
            "no '.': factor is a value",
        ),
        (
            ["model.rope_scaling=none", "model.rope_scaling.factor=4"],
            "--set model.rope_scaling.factor",
            "4",
            "rope_scaling not set to a value before",
        ),
        (
            ["model.rope_scaling.beta_fast=4"],
            "--set model.rope_scaling",
            {"beta_fast": 4.0},
            "model.rope_scaling.factor as well",
        ),
    ],
)
def test_set_refuses(assert_refused, assignments, name, value, rule):
    assert_refused(lambda: changed(*assignments), name, value, rule)


@pytest.mark.parametrize(
    ("assignment", "value", "rule"),
    [
        ("model.rope_scaling.speed=4", "speed", "one of beta_fast, beta_slow, factor"),
        ("model.rope_scaling.factor.x=4", "4", "no '.': factor is a value"),
    ],
)
def test_set_refuses_in_an_existing_section(assert_refused, assignment, value, rule):
    name = "--set " + assignment.split("=")[0]
    assert_refused(lambda: changed(assignment, config=EXTENDED), name, value, rule)


def test_every_field_can_be_set():
    """So that a field of a new type does not go unnoticed; a mixture is for config files."""
    config = RunConfig(
        model=ModelConfig(rope_scaling=YarnConfig(factor=2.0)),
        data=DataConfig(source="text", paths=("a", "b"), tokenizer="t.json", seq_len=64),
        train=TrainConfig(init_from="runs/a"),
        loss=LossConfig(mtp_weight=0.25, bias_update_rate=0.5),
    )
    leaves = [(key, text) for key, text in assignments_of(config) if key != "data.mixture"]
    assert len(leaves) > 70
    assert changed(*(f"{key}={text}" for key, text in leaves)) == config


def assignments_of(section: typing.Any, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, value as typed) of every field, sections opened."""
    found = []
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            found += assignments_of(value, f"{key}.")
        else:
            several = value if isinstance(value, tuple) else (value,)
            found.append((key, ",".join(str(v) for v in several)))
    return found


# Runs in general: dictionaries and assignments give back what went in

names = st.text("abcXYZ019_- é", min_size=1, max_size=8).map(str.strip).filter(bool)
paths = st.lists(names, min_size=1, max_size=3).map(tuple)
shares = st.floats(0, 0.99)
sizes = st.integers(1, 10**6)
weights = st.none() | st.floats(0, 1e3)
any_yarn = st.fixed_dictionaries({"factor": st.floats(1, 1e6), "beta_fast": st.floats(1, 100)})
any_fields = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {
                "vocab_size": sizes,
                "q_lora_rank": st.none() | sizes,
                "norm_topk_prob": st.booleans(),
                "rms_norm_eps": st.floats(1e-30, 1.0),
                "rope_scaling": st.none() | any_yarn,
                "eos_token_id": st.none()
                | st.integers(0, 100)
                | st.lists(st.integers(0, 100), min_size=2).map(tuple),
            }
        ),
        "data": st.fixed_dictionaries(
            {
                "source": st.just("text"),
                "paths": paths,
                "eval_paths": st.just(()) | paths,
                "seq_len": st.integers(2, 4096),
                "tokenizer": st.none() | names,
                "shuffle": st.booleans(),
                "fim_rate": shares,
            }
        ),
        "train": st.fixed_dictionaries(
            {"name": names, "steps": sizes, "init_from": st.none() | names, "seed": sizes}
        ),
        "optimizer": st.fixed_dictionaries(
            {"beta1": shares, "peak_learning_rate": st.floats(0, 1)}
        ),
        "loss": st.fixed_dictionaries({"mtp_weight": weights, "bias_update_rate": weights}),
        "precision": st.fixed_dictionaries({"recipe": st.sampled_from(("fp32", "bf16"))}),
    }
)
mixtures = st.lists(st.tuples(paths, st.floats(0.01, 9)), max_size=2)


def build_run(fields: dict, mixture: list = ()) -> RunConfig:
    """Built in the test: strategies may not run what beartype checks (it draws random numbers)."""
    yarn = fields["model"]["rope_scaling"]
    yarn = None if yarn is None else YarnConfig(**yarn)
    parts = tuple(DataSource(source="text", paths=p, weight=weight) for p, weight in mixture)
    return RunConfig(
        model=ModelConfig(**fields["model"] | {"rope_scaling": yarn}),
        data=DataConfig(**fields["data"], mixture=parts),
        train=TrainConfig(**fields["train"]),
        optimizer=OptimizerConfig(**fields["optimizer"]),
        loss=LossConfig(**fields["loss"]),
        precision=PrecisionConfig(**fields["precision"]),
    )


@settings(max_examples=25)
@given(any_fields, mixtures)
def test_dictionary_and_json_give_it_back(fields, mixture):
    config = build_run(fields, mixture)
    values = to_dict(config)
    assert list(values) == list(SECTIONS)
    assert from_dict(RunConfig, values) == config
    assert from_dict(RunConfig, json.loads(json.dumps(values))) == config


@settings(max_examples=25)
@given(any_fields, any_fields)
def test_assignments_turn_any_run_into_any_other(start, goal):
    goal = build_run(goal)
    keys = [f"{k}={v}" for k, v in assignments_of(goal) if k != "data.mixture"]
    assert apply_overrides(build_run(start), keys) == goal


@pytest.mark.parametrize(
    ("kind", "values", "name", "value", "rule"),
    [
        (RunConfig, {"modl": {}}, "config.modl", {}, "one of data, loss, model"),
        (RunConfig, {"model": 3}, "config.model", 3, "an object"),
        (RunConfig, [], "config", [], "an object"),
        (RunConfig, {"model": None}, "config.model", None, "a value"),
        (RunConfig, {"model": {"layers": 3}}, "config.model.layers", 3, "one of bos_token_id"),
        (TrainConfig, {"steps": "3"}, "config.steps", "3", "a value of type int"),
        (TrainConfig, {"steps": 3.0}, "config.steps", 3.0, "a value of type int"),
        (TrainConfig, {"steps": True}, "config.steps", True, "a value of type int"),
        (TrainConfig, {"steps": None}, "config.steps", None, "a value"),
        (TrainConfig, {"name": 3}, "config.name", 3, "a value of type str"),
        (DataConfig, {"shuffle": 1}, "config.shuffle", 1, "a value of type bool"),
        (DataConfig, {"paths": "a.txt"}, "config.paths", "a.txt", "a list"),
        (DataConfig, {"eval_paths": [3]}, "config.eval_paths", 3, "a value of type str"),
        (OptimizerConfig, {"eps": "1"}, "config.eps", "1", "a value of type float"),
        (OptimizerConfig, {"eps": True}, "config.eps", True, "a value of type float"),
        (YarnConfig, {"beta_fast": 4.0}, "config", {"beta_fast": 4.0}, "factor as well"),
    ],
)
def test_dictionary_refuses(assert_refused, kind, values, name, value, rule):
    assert_refused(lambda: from_dict(kind, values), name, value, rule)


def test_dictionary_takes_integers_for_floats():
    assert type(from_dict(OptimizerConfig, {"eps": 1}).eps) is float


# Across sections


def test_rows_fit_the_model(assert_refused):
    longest = ModelConfig(max_position_embeddings=128)
    assert_refused(
        lambda: RunConfig(model=longest, data=DataConfig(seq_len=129)),
        "data.seq_len",
        129,
        "at most model.max_position_embeddings = 128",
    )
    assert RunConfig(model=longest, data=DataConfig(seq_len=128)).data.seq_len == 128
    three_ahead = ModelConfig(num_nextn_predict_layers=3)
    assert_refused(
        lambda: RunConfig(model=three_ahead, data=DataConfig(seq_len=3)),
        "data.seq_len",
        3,
        "more than model.num_nextn_predict_layers = 3",
    )


NARROW = (  # every width of the model but that of the experts below a tile
    *("model.hidden_size=64", "model.q_lora_rank=64", "model.kv_lora_rank=64"),
    *("model.num_attention_heads=2", "model.v_head_dim=32", "model.intermediate_size=64"),
    *("model.moe_intermediate_size=128", "precision.recipe=fp8"),
)


@pytest.mark.parametrize(
    ("assignment", "name", "value", "rule"),
    [
        ("model.hidden_size=192", "model.hidden_size", 192, "a multiple of 128, or less"),
        ("model.q_lora_rank=200", "model.q_lora_rank", 200, "a multiple of 128, or less"),
        ("model.kv_lora_rank=129", "model.kv_lora_rank", 129, "a multiple of 128, or less"),
        ("model.intermediate_size=10944", "model.intermediate_size", 10944, "a multiple of 128"),
        (
            "model.num_attention_heads=5",
            "model.num_attention_heads x v_head_dim",
            160,
            "a multiple of 128, or less",
        ),
        ("model.moe_intermediate_size=64", "model.moe_intermediate_size", 64, "blocks of 128"),
        ("precision.combine=logfmt10", "model.hidden_size", 64, "where precision.combine is"),
    ],
)
def test_fp8_cuts_no_tile(assert_refused, assignment, name, value, rule):
    assert changed(*NARROW).precision.dispatch_format == "fp8"
    assert_refused(lambda: changed(*NARROW, assignment), name, value, rule)
    if not assignment.startswith("precision"):
        assert changed(*NARROW, assignment, "precision.recipe=bf16").precision.recipe == "bf16"


def test_fp8_packs_two_values_of_o_projs_input(assert_refused):
    odd = ("model.num_attention_heads=3", "model.v_head_dim=5")
    name = "model.num_attention_heads x v_head_dim"
    assert_refused(lambda: changed(*NARROW, *odd), name, 15, "an even number")


def test_fp8_dispatch_alone_needs_whole_rows(assert_refused):
    alone = "precision.dispatch=fp8"
    refused = ("model.hidden_size=192", alone)
    assert_refused(lambda: changed(*refused), "model.hidden_size", 192, "a multiple of 128")
    assert changed("model.moe_intermediate_size=64", alone).precision.dispatch_format == "fp8"


# Config files


def write(folder: Path, source: str) -> Path:
    path = folder / "mine.py"
    path.write_text(source, encoding="utf-8")
    return path


def test_reads_a_file(tmp_path):
    path = write(
        tmp_path,
        "from dsv3_jax.config import RunConfig, TrainConfig\n"
        "def config():\n"
        "    return RunConfig(train=TrainConfig(steps=7))\n",
    )
    assert read_config(path).train.steps == 7
    assert read_config(str(path)) == read_config(path)


@pytest.mark.parametrize("name", ["absent.py", "."])
def test_file_is_missing(assert_refused, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert_refused(lambda: read_config(name), "CONFIG", name, CONFIG_RULE)


def test_file_is_not_python(assert_refused, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("{}", encoding="utf-8")
    assert_refused(lambda: read_config(path), "CONFIG", str(path), "a file whose name ends in .py")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = 1", "AttributeError: .* has no attribute 'config'"),
        ("def config(:", "SyntaxError: invalid syntax"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def config():\n    return {}['key']", "KeyError: 'key'"),
        ("def config():\n    raise RuntimeError('two\\nlines')", "RuntimeError: two"),
        ("def config(argument): pass", "TypeError: .*missing 1 required positional argument"),
        ("def config(): return 3", r"config\(\) is <class 'int'>, expected a RunConfig"),
        ("def config(): pass", r"config\(\) is <class 'NoneType'>, expected a RunConfig"),
        (
            "from dsv3_jax.config import *\ndef config(): return TrainConfig(steps=0)",
            "train.steps is 0, expected a number of at least 1",
        ),
        (
            "from dsv3_jax.config import *\ndef config(): return TrainConfig(stepz=1)",
            "TypeError: .*unexpected keyword argument 'stepz'",
        ),
    ],
)
def test_file_fails(tmp_path, source, found):
    path = write(tmp_path, source)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: {found}") as raised:
        read_config(path)
    assert "expected" in str(raised.value)


def test_there_are_configs():
    assert {"configs/demo.py", "configs/bench_tiny.py", "configs/bench_small.py"} <= set(
        CONFIG_FILES
    )


@pytest.mark.parametrize("path", CONFIG_FILES)
def test_configs_load_and_say_where_they_come_from(path):
    config = read_config(ROOT / path)
    assert config.train.name == Path(path).stem
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
    docstring = (ROOT / path).read_text(encoding="utf-8").split('"""')[1]
    assert re.search(r"\bSource: \S", docstring)
    assert re.search(r"\bHardware\b[^:\n]*: \S", docstring)
