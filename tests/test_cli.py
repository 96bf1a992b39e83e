"""The `dsv3` command and the package's three functions, as a user and a script meet them."""

import inspect
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsv3_jax
from dsv3_jax import cli
from dsv3_jax.config import ModelConfig
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.train import loop
from dsv3_jax.train.diagnosis import NonFiniteError

ROOT = Path(__file__).resolve().parents[1]
BENCH_TINY = str(ROOT / "configs" / "bench_tiny.py")
COMMANDS = ("train", "generate", "import", "export", "bench", "compile")
SHAPE = dict(
    vocab_size=280,
    hidden_size=32,
    intermediate_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=0,
)
SMALL = [f"--set=model.{name}={value}" for name, value in SHAPE.items()]
SMALL += ["--set=data.seq_len=32", "--set=train.batch_size=2"]
EXPECTED_CHECKPOINT = "expected a Hugging Face directory, a run directory or one of its steps"


@pytest.fixture
def dsv3(capsys, tmp_path, monkeypatch):
    """Runs a command in this process, in an empty folder: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def run(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = left.code
        return code, *capsys.readouterr()

    return run


def run_python(*arguments, **options):
    """A true process, which imports the package from where this one does."""
    environment = os.environ | {"PYTHONPATH": str(Path(dsv3_jax.__file__).parents[1])}
    environment.pop("PYTHONUNBUFFERED", None)  # it would hide what goes wrong in the last flush
    settings = dict(capture_output=True, text=True, check=False, env=environment) | options
    return subprocess.run([sys.executable, *map(str, arguments)], **settings)


def assert_one_line(errors, command, *fragments):
    assert errors.endswith("\n"), errors
    assert errors.count("\n") == 1, errors
    assert errors.startswith(f"{command}: "), errors
    for fragment in fragments:
        assert fragment in errors, errors


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A Hugging Face directory of a random model, with a tokenizer."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = train_tokenizer(["def a():\n    return 1\n" * 9], SHAPE["vocab_size"])
    tokenizer.save(folder / "tokenizer.json")
    config = ModelConfig(
        **SHAPE,
        max_position_embeddings=64,
        eos_token_id=None,
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(0)  # jax.random would be compiled for every shape: 8 s
    draw = lambda leaf: jnp.asarray(random.normal(0, 0.1, leaf.shape), leaf.dtype)  # noqa: E731
    model = nnx.merge(graph, jax.tree.map(draw, state))
    dsv3_jax.save_hf(model, folder / "model", tokenizer_from=folder / "tokenizer.json")
    return folder / "model"


# Help


def test_help_names_every_command(dsv3):
    code, output, errors = dsv3("--help")
    assert (code, errors) == (0, "")
    assert all(f"\n    {command} " in output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_has_help(dsv3, command):
    code, output, errors = dsv3(command, "--help")
    assert (code, errors) == (0, "")
    assert output.startswith(f"usage: dsv3 {command} ")


def test_module_is_the_command_and_its_help_needs_no_jax(tmp_path):
    shown = run_python("-m", "dsv3_jax.cli", "--help", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("usage: dsv3 ")
    program = "import sys, dsv3_jax, dsv3_jax.cli; print('jax' in sys.modules)"
    assert run_python("-c", program, cwd=tmp_path).stdout == "False\n"


# One line and exit code 2

WRONG_USE = [
    ([], "dsv3", "COMMAND is missing"),
    (["fly"], "dsv3", "'fly'", "choose from 'train', 'generate'"),
    (["--nope"], "dsv3", "--nope"),
    (["train"], "dsv3 train", "config"),
    (["train", BENCH_TINY, "--sett", "train.steps=1"], "dsv3 train", "--sett"),
    (["train", BENCH_TINY, "--se", "train.steps=1"], "dsv3 train", "--se"),
    (["train", BENCH_TINY, "more"], "dsv3 train", "more"),
    (["train", BENCH_TINY, "--two\nlines"], "dsv3 train", "--two lines"),
    (["train", BENCH_TINY, "--set"], "dsv3 train", "--set", "expected one argument"),
    (["bench"], "dsv3 bench", "what"),
    (["bench", "fly"], "dsv3 bench", "'fly'", "choose from 'train', 'decode'"),
    (["bench", "train", "--repeats", "x"], "dsv3 bench train", "--repeats", "'x'", "int"),
    (["generate"], "dsv3 generate", "checkpoint"),
    (["generate", "a", "--top-k", "1.5"], "dsv3 generate", "--top-k", "'1.5'", "int"),
    (["generate", "a", "--temp", "1"], "dsv3 generate", "--temp"),
    (["import", "a"], "dsv3 import", "target"),
    (["export", "a", "b", "--weights", "int4"], "dsv3 export", "'int4'", "'float8_e4m3fn'"),
]
WRONG_CONFIG = [
    (["absent.py"], "CONFIG is 'absent.py'", "expected a Python file"),
    (["."], "CONFIG is '.'", "expected a Python file"),
    ([BENCH_TINY, "--set", "train.steps"], "--set is 'train.steps'", "section.field=value"),
    ([BENCH_TINY, "--set", "trian.steps=1"], "--set trian.steps", "expected one of data, loss"),
    ([BENCH_TINY, "--set", "train.stepz=1"], "--set train.stepz", "expected one of accumulation"),
    ([BENCH_TINY, "--set", "train.steps=many"], "--set train.steps is 'many'", "an integer"),
    ([BENCH_TINY, "--set", "train.steps=0"], "train.steps is 0", "a number of at least 1"),
    ([BENCH_TINY, "--set", "data.seq_len=2048"], "data.seq_len is 2048", "at most model.max_"),
    ([BENCH_TINY, "--set", "train.init_from=absent"], "absent: found nothing", EXPECTED_CHECKPOINT),
]


PIPELINE = [
    *("--set=parallel.pipe=2", "--set=parallel.schedule=1f1b"),
    *("--set=parallel.micro_batches=4", "--set=parallel.simulated_devices=2"),
]
UNIT = BENCH_TINY.replace("bench_tiny", "v3_671b_decode")
WRONG_CONFIG.append(([UNIT], "serve.unit is 'decode'", "a unit's config is for `dsv3 compile`"))
FIVE_STAGES = ["--set=parallel.pipe=5", "--set=parallel.simulated_devices=5"]
WRONG_CONFIG += [
    ([BENCH_TINY, *PIPELINE, *changes], *fragments)
    for changes, *fragments in (
        (["--set=parallel.pipe=1"], "parallel.schedule is '1f1b'", "or parallel.pipe above 1"),
        (["--set=parallel.schedule=none"], "parallel.schedule is 'none'", "one of 1f1b, zb1p"),
        (["--set=parallel.schedule=gpipe"], "parallel.schedule is 'gpipe'", "one of none, 1f1b"),
        (["--set=parallel.micro_batches=3"], "parallel.micro_batches is 3", "a divisor of train."),
        (["--set=parallel.micro_batches=two"], "--set parallel.micro_batches", "an integer"),
        (["--set=parallel.simulated_devices=3"], "parallel.simulated_devices is 3", "gpu = 2"),
        (["--set=train.accumulation=2"], "train.accumulation is 2", "1 where parallel.pipe is"),
        (["--set=parallel.zero=3"], "parallel.zero is 3", "1 where parallel.pipe is above 1"),
        (FIVE_STAGES, "parallel.pipe = 5: 5 stages is 5", "at most 4, the model's layers"),
    )
]


@pytest.mark.parametrize(
    ("arguments", "command", "fragments"), [(a, c, f) for a, c, *f in WRONG_USE]
)
def test_wrong_use(dsv3, arguments, command, fragments):
    code, output, errors = dsv3(*arguments)
    assert (code, output) == (2, "")
    assert_one_line(errors, command, *fragments, f"(see {command} --help)")


@pytest.mark.parametrize(("arguments", "fragments"), [(a, f) for a, *f in WRONG_CONFIG])
def test_wrong_config(dsv3, tmp_path, arguments, fragments):
    code, output, errors = dsv3("train", *arguments)
    assert (code, output) == (2, "")
    assert_one_line(errors, "dsv3 train", *fragments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--config", "absent.py"], ["CONFIG is 'absent.py'", "expected a Python file"]),
        (["--set", "a.b=1"], ["--set a.b is 'a'", "expected one of data"]),
        (["--repeats", "0"], ["--repeats is 0", "expected at least 1"]),
        (["--batch-size", "0"], ["--batch-size is 0", "expected at least 1"]),
    ],
)
def test_wrong_bench(dsv3, arguments, fragments):
    code, output, errors = dsv3("bench", "train", "--config", BENCH_TINY, *arguments)
    assert (code, output) == (2, "")
    assert_one_line(errors, "dsv3 bench", *fragments)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["train", "--op", "permute"], ["--op is of the bench of kernels", "expected none"]),
        (["decode", "--static"], ["--static is of the bench of kernels", "expected none"]),
        (["kernels", "--config", "a.py"], ["--config is of the bench of train and decode"]),
        (["kernels", "--set", "a.b=1"], ["--set is of the bench of train and decode"]),
        (["kernels", "--write", "a.md"], ["--write is of what is compiled", "expected --static"]),
        (["kernels"], ["the device is cpu", "expected a Hopper GPU, or --static without one"]),
    ],
)
def test_wrong_bench_of_kernels(dsv3, arguments, fragments):
    code, output, errors = dsv3("bench", *arguments)
    assert (code, output) == (2, "")
    assert_one_line(errors, "dsv3 bench", *fragments)


def test_wrong_types_in_a_config_file(tmp_path):
    """In a process of its own: here the annotation checks of the tests come first."""
    (tmp_path / "mine.py").write_text(
        "from dsv3_jax.config import *\n"
        "def config(): return RunConfig(train=TrainConfig(steps=9.0))\n"
    )
    result = run_python("-m", "dsv3_jax.cli", "train", "mine.py", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    expected = "mine.py: train.steps is 9.0, expected a value of type int"
    assert_one_line(result.stderr, "dsv3 train", expected)


@pytest.mark.parametrize(
    ("door", "arguments"), [(["train.py"], []), (["-m", "dsv3_jax.cli"], ["train"])]
)
def test_doors_from_elsewhere(tmp_path, door, arguments):
    script = [ROOT / "train.py"] if door == ["train.py"] else door
    shown = run_python(*script, *arguments, "--help", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("usage: dsv3 train ")
    refused = run_python(*script, *arguments, BENCH_TINY, "--set", "train.steps=-1", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert_one_line(refused.stderr, "dsv3 train", "train.steps is -1")


# What a command's end means


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a is 1, expected\n 2"), 2, "a is 1, expected 2"),
        (FileNotFoundError(2, "No such file", "a.txt"), 2, "[Errno 2] No such file: 'a.txt'"),
        (NonFiniteError("step 3: loss nan"), 1, "step 3: loss nan"),
        (loop.Interrupted("SIGTERM after step 3", signal.SIGTERM), 143, "SIGTERM after step 3"),
        (loop.Interrupted("SIGINT after step 3", signal.SIGINT), 130, "SIGINT after step 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(dsv3, monkeypatch, error, code, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(loop, "train", fail)
    assert dsv3("train", BENCH_TINY) == (code, "", f"dsv3 train: {line}\n")


def test_a_bug_keeps_its_traceback(dsv3, monkeypatch):
    def fail(*_, **__):
        raise TypeError("ours")

    monkeypatch.setattr(loop, "train", fail)
    with pytest.raises(TypeError, match="ours"):
        dsv3("train", BENCH_TINY)


@pytest.mark.parametrize("flushed", [True, False])
def test_reader_that_leaves_is_no_error(tmp_path, flushed):
    """As in `dsv3 generate ... | head`, whether the pipe breaks in the command or after it."""
    program = (
        "import sys, dsv3_jax.cli as cli\n"
        "def talk(options):\n"
        f"    print('text' * {100_000 if flushed else 1}, flush={flushed})\n"
        "    return 0\n"
        "cli.run_generate = talk\n"
        "sys.stdin.readline()\n"
        "sys.exit(cli.main(['generate', 'somewhere']))"
    )
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = run_python(
            "-c",
            program,
            cwd=tmp_path,
            capture_output=False,
            input="\n",
            stdout=writing,
            stderr=subprocess.PIPE,
        )
    finally:
        os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


# Commands at work


@pytest.mark.slow
def test_bench_prints_one_json_object_and_nothing_else(tmp_path):
    arguments = ["bench", "train", "--config", BENCH_TINY, "--json", "--repeats", "1", *SMALL]
    result = run_python("-m", "dsv3_jax.cli", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1
    report = json.loads(result.stdout)
    wanted = {"tokens_per_second", "step_seconds", "matrix_peak_gflops", "share_of_peak"}
    assert wanted <= report.keys()
    assert all(report[key] > 0 for key in wanted)
    assert report["tokens_per_second"] * report["step_seconds"] == pytest.approx(2 * 32)


@pytest.mark.slow
def test_train_in_a_pipeline_of_simulated_devices(tmp_path):
    """The demo's config, made small, on its own data: the losses are those of one device."""
    for name, count in (("corpus", 900), ("held", 300)):
        lines = [f"def f{i}(x):\n    return x + {i}\n" for i in range(count)]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    common = [
        *SMALL,
        *("--set=model.num_hidden_layers=3", "--set=model.first_k_dense_replace=1"),
        *("--set=model.num_nextn_predict_layers=1", "--set=train.batch_size=8"),
        *("--set=train.steps=3", "--set=train.eval_every=3", "--set=train.eval_batches=1"),
        *("--set=data.source=text", "--set=data.paths=corpus.txt"),
        *("--set=data.eval_paths=held.txt", "--set=data.eval_fraction=0"),
    ]
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    quick = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT / "src")}
    runs = []
    for name, flags in (("alone", []), ("pipeline", PIPELINE)):
        arguments = [ROOT / "configs" / "demo.py", *common, f"--set=train.name={name}", *flags]
        result = run_python("-m", "dsv3_jax.cli", "train", *arguments, cwd=tmp_path, env=quick)
        assert result.returncode == 0, result.stderr
        assert "step 3/3" in result.stdout and "step 3: held-out loss" in result.stdout
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        runs.append([json.loads(line) for line in lines])
    alone, pipeline = runs
    for name in ("tokens_seen", "loss", "mtp_loss", "balance_loss", "grad_norm"):
        for found, expected in zip(pipeline, alone, strict=True):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert pipeline[-1]["eval_loss"] == pytest.approx(alone[-1]["eval_loss"], rel=1e-5)


def test_import_train_generate_and_export(dsv3, hub, tmp_path):
    prompt = ["--prompt", "def ", "--max-new-tokens", 6]
    _, expected, errors = dsv3("generate", hub, *prompt)
    assert expected.startswith("def ")
    assert errors == ""

    code, output, _ = dsv3("import", hub, "runs/imported")
    assert code == 0
    assert output.startswith("runs/imported/checkpoints/0: train with --set train.init_from=")
    assert dsv3("generate", "runs/imported", *prompt) == (0, expected, "")

    assert dsv3("export", "runs/imported", "back")[:2] == (
        0,
        "back: bfloat16 safetensors for Hugging Face\n",
    )
    weights = "model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (hub / weights).read_bytes()

    (tmp_path / "a.txt").write_text("def a():\n    return 1\n" * 200)
    train = ["train", BENCH_TINY, "--set=train.name=on", "--set=train.steps=1"]
    train += ["--set=data.source=text", "--set=data.paths=a.txt", "--set=data.eval_fraction=0"]
    train += ["--set=data.seq_len=32", "--set=train.batch_size=2"]
    code, output, errors = dsv3(*train, "--set=train.init_from=runs/imported")
    assert (code, errors) == (0, "")
    assert "runs/on: metrics.jsonl, training.png, checkpoints/1\n" in output
    run = tmp_path / "runs" / "on"
    assert json.loads((run / "config.json").read_text())["model"]["vocab_size"] == 280
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1

    code, output, errors = dsv3(*train)
    assert (code, output) == (2, "")
    assert_one_line(errors, "dsv3 train", "runs/on holds a run with model.", "expected")

    _, newest, errors = dsv3("generate", run, *prompt)
    assert errors == ""
    assert dsv3("generate", run / "checkpoints" / "1", *prompt) == (0, newest, "")


def test_generate_reads_standard_input_and_several_prompts(dsv3, hub, monkeypatch):
    _, one, _ = dsv3("generate", hub, "--prompt", "def ", "--max-new-tokens", 4)
    _, other, _ = dsv3("generate", hub, "--prompt", "a", "--max-new-tokens", 4)
    _, both, _ = dsv3("generate", hub, "--prompt", "def ", "--prompt", "a", "--max-new-tokens", 4)
    assert both == f"{one}\n{other}"
    monkeypatch.setattr(sys, "stdin", io.StringIO("def \n"))
    assert dsv3("generate", hub, "--max-new-tokens", 4) == (0, one, "")


WRONG_GENERATE = [
    (["--temperature", "-1"], "temperature is -1.0", "at least 0"),
    (["--temperature", "nan"], "temperature is nan", "at least 0"),
    (["--top-p", "0"], "top_p is 0.0", "above 0 and at most 1"),
    (["--top-p", "1.1"], "top_p is 1.1", "above 0 and at most 1"),
    (["--top-k", "-1"], "top_k is -1", "0 (off) or a positive integer"),
    (["--seed", "-1"], "seed is -1", "from 0 to below 2**32"),
    (["--seed", str(2**64)], f"seed is {2**64}", "from 0 to below 2**32"),
    (["--max-new-tokens", "-3"], "max_new_tokens is -3", "at least 0"),
    (["--max-new-tokens", "64"], "is 65", "at most max_position_embeddings = 64"),
    (["--prompt", ""], "prompt is ''", "at least one token"),
    (["--prompt", "b\udcff"], r"prompt is 'b\udcff'", "UTF-8 text"),  # how Python passes byte ff
    (["--stop", ""], "stop is ''", "at least one character"),
    (["--dtype", "int8"], "dtype is 'int8'", "one of float32, bfloat16"),
]


@pytest.mark.parametrize(("arguments", "fragments"), [(a, f) for a, *f in WRONG_GENERATE])
def test_wrong_generate(dsv3, hub, arguments, fragments):
    """Also where an earlier prompt is right: nothing is generated first."""
    first = ["--prompt", "a", "--max-new-tokens", 2]
    code, output, errors = dsv3("generate", hub, *first, *arguments)
    assert (code, output) == (2, "")
    assert_one_line(errors, "dsv3 generate", *fragments)


def test_generate_without_a_prompt(dsv3, hub):
    code, output, errors = dsv3("generate", hub)
    assert (code, output) == (2, "")
    assert_one_line(errors, "dsv3 generate", "prompt is ''")


@pytest.fixture
def places(tmp_path, hub) -> dict[str, Path]:
    """Paths that are no checkpoint."""
    (tmp_path / "file").write_text("hi")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"a": 1}')
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text('{"model": {"rope_scaling": {}}}')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").write_text("hi")
    (tmp_path / "mute").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "mute" / name).write_bytes((hub / name).read_bytes())
    names = ("absent", "file", "empty", "other", "cut", "full", "mute")
    return {name: tmp_path / name for name in names} | {"hub": hub}


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("absent", "absent: found nothing"),
        ("file", "file: found a file"),
        ("empty", "empty: found no files"),
        ("other", "config.json: found neither model_type nor model in it"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "export"])
def test_no_checkpoint(dsv3, places, command, place, found):
    more = {"generate": ["--prompt", "a"], "export": ["new"]}[command]
    code, output, errors = dsv3(command, places[place], *more)
    assert (code, output) == (2, "")
    assert_one_line(errors, f"dsv3 {command}", found, EXPECTED_CHECKPOINT)
    assert not Path("new").exists()


def test_damaged_run_config(dsv3, places):
    code, output, errors = dsv3("export", places["cut"], "new")
    assert (code, output) == (2, "")
    assert_one_line(errors, "dsv3 export", "config.json: model.rope_scaling is {}", "factor")


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_damaged_config_of_the_run_to_go_on_with(dsv3, tmp_path, content):
    (tmp_path / "runs" / "bench_tiny").mkdir(parents=True)
    (tmp_path / "runs" / "bench_tiny" / "config.json").write_text(content)
    code, output, errors = dsv3("train", BENCH_TINY)
    assert (code, output) == (2, "")
    assert_one_line(errors, "dsv3 train", "runs/bench_tiny/config.json: ", "expected the config")


def test_no_tokenizer(dsv3, places):
    code, output, errors = dsv3("generate", places["mute"], "--prompt", "a")
    assert (code, output) == (2, "")
    assert_one_line(errors, "dsv3 generate", "mute has no tokenizer.json", "expected one")
    arguments = [BENCH_TINY, "--set=data.seq_len=32", f"--set=train.init_from={places['mute']}"]
    code, output, errors = dsv3("train", *arguments)
    assert (code, output) == (2, "")
    assert_one_line(errors, "dsv3 train", "mute has no tokenizer.json", "data.tokenizer")


@pytest.mark.parametrize("place", ["absent", "file", "empty"])
def test_import_of_no_checkpoint(dsv3, places, place):
    code, output, errors = dsv3("import", places[place], "new")
    assert (code, output) == (2, "")
    assert_one_line(errors, "dsv3 import", place, "expected")
    assert not Path("new").exists()


@pytest.mark.parametrize("place", ["file", "full"])
@pytest.mark.parametrize("command", ["import", "export"])
def test_target_is_not_overwritten(dsv3, places, command, place):
    code, output, errors = dsv3(command, places["hub"], places[place])
    assert (code, output) == (2, "")
    assert_one_line(errors, f"dsv3 {command}", place, "expected a new or an empty directory")
    assert places["file"].read_text() == (places["full"] / "keep").read_text() == "hi"


# The package


def test_public_functions_keep_their_signatures():
    """Programs outside the repository call these; more parameters may follow, by name."""

    def parameters(function):
        found = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in found if p.kind is not p.KEYWORD_ONLY}

    required = inspect.Parameter.empty
    load = {"path": required, "dtype": "float32", "mesh": None}
    generate = {"model": required, "prompts": required, "max_new_tokens": 64}
    generate |= {"temperature": 0.0, "top_p": 1.0, "seed": 0}
    assert parameters(dsv3_jax.load) == load
    assert parameters(dsv3_jax.generate) == generate
    assert parameters(dsv3_jax.save_hf) == {
        "model": required,
        "path": required,
        "weights": "bfloat16",
    }
    assert set(dir(dsv3_jax)) >= {"load", "generate", "save_hf"}
    with pytest.raises(AttributeError, match="'dsv3_jax' has no attribute 'train_it'"):
        dsv3_jax.train_it  # noqa: B018


def test_public_functions_work_together(hub, tmp_path):
    model = dsv3_jax.load(hub, dtype="float32", mesh=None)
    logits = model(jnp.asarray([[5, 6, 7]], jnp.int32))
    assert (logits.shape, logits.dtype) == ((1, 3, 280), jnp.float32)
    made = dsv3_jax.generate(model, [[5, 6, 7], [8]], max_new_tokens=1)
    assert made[0] == [int(np.argmax(logits[0, -1]))]
    assert [len(row) for row in made] == [1, 1]
    assert all(type(token) is int for row in made for token in row)
    dsv3_jax.save_hf(model, tmp_path / "again", weights="float32")
    again = dsv3_jax.load(str(tmp_path / "again"))
    np.testing.assert_array_equal(again(jnp.asarray([[5, 6, 7]], jnp.int32)), logits)
