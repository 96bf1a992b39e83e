"""The `dsv3` command. Bad input ends in one line and exit code 2."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from dsv3_jax.config import RunConfig, ServerConfig, apply_overrides, read_config
from dsv3_jax.environment import restart_with_huge_pages, simulate_devices
from dsv3_jax.serve.server.options import add_arguments as add_serve_arguments

EXAMPLES = """examples:
  dsv3 train configs/demo.py --set train.steps=200
  dsv3 generate runs/demo --prompt 'def ' --temperature 0.8
  dsv3 serve runs/demo --port 8000
  dsv3 import ~/DeepSeek-V3-tiny runs/imported
  dsv3 export runs/demo exported --weights float8_e4m3fn
  dsv3 bench train --config configs/bench_tiny.py --json
  dsv3 bench kernels --static --op mla_prefill
  dsv3 bench serve http://127.0.0.1:8000 --rate 4 --requests 50
  dsv3 compile configs/v3_671b.py --gpu h800 --hosts 256 --dump compiled
  dsv3 schedule dualpipe --stages 8 --micro-batches 20 --png schedule.png
  dsv3 plan train configs/v3_671b.py --cluster h800_2048"""
BENCH_CONFIG = "configs/bench_tiny.py"
BENCHES = {
    "train": "Training steps on this machine.",
    "decode": "Decoding on this machine.",
    "kernels": "The GPU kernels: on a Hopper GPU, or compiled for one that is not here.",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and that takes no shortened flags."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options, allow_abbrev=False)
        self.fill: Callable[[Parser], None] | None = None
        """What adds the arguments, when they are first asked for."""

    def parse_known_args(self, args=None, namespace=None):
        """Refuses what it does not know itself, or a command's wrong flag would be `dsv3`'s."""
        if self.fill is not None:
            fill, self.fill = self.fill, None
            fill(self)
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        text = " ".join(message.split())
        self.exit(2, f"{self.prog}: {text} (see {self.prog} --help)\n")


def run(arguments: Sequence[str] | None = None) -> int:
    """`main` as a command of its own, in a process set up for it."""
    restart_with_huge_pages()
    return main(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code: 0, 1 for a failed run, 2 for bad input, 128+n for signals.

    Messages of expected errors go to standard error as one line; anything else is a bug and keeps
    its traceback.
    """
    top = parser()
    options = top.parse_args(arguments)
    if options.command is None:
        top.error("COMMAND is missing")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    name = f"dsv3 {options.command}"
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output has left: end as SIGPIPE would
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        return _fail(name, error, 2)
    except ArithmeticError as error:
        return _fail(name, error, 1)
    except KeyboardInterrupt:
        return _fail(name, "interrupted", 130)


def _fail(name: str, message: object, code: int) -> int:
    text = " ".join(str(message).split())
    print(f"{name}: {text}", file=sys.stderr)
    return code


def parser() -> Parser:
    """The parser of all commands."""
    top = Parser(
        prog="dsv3",
        description="Train, run and exchange DeepSeek-V3 models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> Parser:
        made = commands.add_parser(name, help=summary, description=summary)
        made.set_defaults(run=run)
        return made

    train = command("train", run_train, "Train under runs/NAME, or go on where a run stopped.")
    train.add_argument("config", help="a Python file with `def config() -> RunConfig`")
    _add_set(train)
    train.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, for several")
    train.add_argument("--processes", type=int, metavar="N", help="how many there are")
    train.add_argument("--process", type=int, metavar="I", help="which this one is, from 0")

    generate = command("generate", run_generate, "Continue prompts, streaming the text.")
    generate.add_argument("checkpoint", help="a run directory, a step of it, or Hugging Face's")
    generate.add_argument(
        "--prompt", action="append", help="text to continue; repeatable (default: standard input)"
    )
    generate.add_argument("--max-new-tokens", type=int, default=128, help="(default 128)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    generate.add_argument("--top-k", type=int, default=0, help="0 keeps all (default)")
    generate.add_argument("--top-p", type=float, default=1.0, help="1 keeps all (default)")
    generate.add_argument("--stop", action="append", default=[], help="text to end at; repeatable")
    generate.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first prompt, counted up for the others (default 0)",
    )
    generate.add_argument(
        "--dtype",
        default="float32",
        help="float32 (default), bfloat16, or float8_e4m3fn: weights and their products in FP8",
    )

    serving = command("serve", run_serve, "Answer OpenAI's API, and a page to chat on, at a port.")
    add_serve_arguments(serving)

    importing = command("import", run_import, "Make a run directory of a Hugging Face checkpoint.")
    importing.add_argument("source", help="a Hugging Face directory")
    importing.add_argument("target", help="the run directory to make, e.g. runs/imported")

    exporting = command("export", run_export, "Write a checkpoint as Hugging Face safetensors.")
    exporting.add_argument("checkpoint", help="a run directory, a step of it, or Hugging Face's")
    exporting.add_argument("target", help="the directory to make")
    exporting.add_argument(
        "--weights",
        default="bfloat16",
        choices=("bfloat16", "float32", "float8_e4m3fn"),
        help="(default bfloat16)",
    )

    bench = command("bench", run_bench, "Measure training, decoding, kernels or a server.")
    benches = bench.add_subparsers(dest="what", required=True)
    for what, summary in BENCHES.items():
        _add_bench(benches.add_parser(what, help=summary, description=summary))
    summary = "Ask a server for answers at a rate, and measure latency and throughput."
    serving_bench = benches.add_parser("serve", help=summary, description=summary)
    serving_bench.fill = _add_bench_serve

    schedule = command("schedule", run_schedule, "Draw a pipeline schedule and what it costs.")
    schedule.add_argument("name", help="1f1b, zb1p, dualpipe or dualpipev")
    schedule.add_argument(
        "--stages", type=int, required=True, help="of the model; dualpipev has two on a rank"
    )
    schedule.add_argument(
        "--micro-batches", type=int, required=True, help="of a step, of both directions together"
    )
    schedule.add_argument(
        "--durations", metavar="F,FB,B,W", help="seconds a stage (default: DeepSeek-V3 on H800)"
    )
    schedule.add_argument("--png", type=Path, metavar="FILE", help="draw it with its durations")
    schedule.add_argument("--json", action="store_true", help="print one JSON object only")

    plan = command("plan", run_plan, "Predict time and cost on clusters that are not here.")
    plan.fill = _add_plan

    compiling = command("compile", run_compile, "Compile a run's step for GPUs that are not here.")
    compiling.add_argument("config", help="a Python file with `def config() -> RunConfig`")
    compiling.add_argument("--gpu", required=True, help="h100, h200, h800 or b200")
    compiling.add_argument("--hosts", type=int, required=True, help="nodes of eight GPUs")
    compiling.add_argument("--dump", metavar="DIR", help="write the program and an HTML page there")
    compiling.add_argument("--json", action="store_true", help="print one JSON object only")
    _add_set(compiling)
    return top


def _add_bench(bench: Parser) -> None:
    bench.add_argument("--config", help=f"of train and decode (default {BENCH_CONFIG})")
    bench.add_argument("--batch-size", type=int, help="sequences (train: the config's; decode: 1)")
    bench.add_argument("--repeats", type=int, default=7, help="timed repeats (default 7)")
    bench.add_argument("--json", action="store_true", help="print one JSON object only")
    bench.add_argument(
        "--static", action="store_true", help="kernels: compile for an H800 that is not here"
    )
    bench.add_argument("--op", help="kernels: those of one op (default: of all)")
    bench.add_argument(
        "--write", type=Path, metavar="FILE", help="kernels, static: put the table into this file"
    )
    _add_set(bench)


def _add_bench_serve(bench: Parser) -> None:
    from dsv3_jax.plan.bench_serve import add_arguments

    add_arguments(bench)


def _add_set(command: Parser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change the config; repeatable, e.g. --set train.steps=200",
    )


def run_train(options: argparse.Namespace) -> int:
    """`dsv3 train`."""
    config = _config(options)  # before JAX is loaded: what is wrong is said at once
    config.check_is_training()
    simulate_devices(config.parallel.simulated_devices)

    from dsv3_jax.train.loop import Interrupted, train
    from dsv3_jax.train.processes import join, process_group

    join(process_group(options.coordinator, options.processes, options.process, os.environ))
    initial = tokenizer = None
    if config.train.init_from is not None:
        changed = [setting.partition("=")[0].strip() for setting in options.set]
        fields = [name.removeprefix("model.") for name in changed if name.startswith("model.")]
        path = Path(config.train.init_from)
        config, initial, tokenizer = _initialise_from(config, path, fields)
    try:
        train(config, initial=initial, tokenizer=tokenizer)
    except Interrupted as stop:
        return _fail("dsv3 train", stop, 128 + stop.signal_number)
    return 0


def _config(options: argparse.Namespace) -> RunConfig:
    return apply_overrides(read_config(options.config), options.set)


def _initialise_from(config: RunConfig, path: Path, model_fields: list[str]):
    """The config with the checkpoint's model, that model, and the tokenizer that belongs to it.

    Raises ValueError where a field of `model_fields`, set by the user, is another than there.
    """
    from dsv3_jax.data.tokenizer import load_tokenizer
    from dsv3_jax.export.load import find_tokenizer, load, read_model_config

    model_config = read_model_config(path)
    for field in (name.partition(".")[0] for name in model_fields):
        wanted, found = getattr(config.model, field), getattr(model_config, field)
        if wanted != found:
            raise ValueError(
                f"--set model.{field} is {wanted!r}, expected {found!r} or nothing: the model is"
                f" that of train.init_from {path}"
            )
    config = dataclasses.replace(config, model=model_config)
    tokenizer_path = find_tokenizer(path)
    tokenizer = None
    if tokenizer_path is not None and config.data.tokenizer is None:
        tokenizer = load_tokenizer(tokenizer_path, model_config.vocab_size)
    if tokenizer is None and config.data.tokenizer is None and config.data.has_text:
        raise ValueError(
            f"train.init_from {path} has no tokenizer.json, expected one there or data.tokenizer:"
            " a new one would not fit the weights"
        )
    return config, load(path, dtype="float32"), tokenizer


def run_generate(options: argparse.Namespace) -> int:
    """`dsv3 generate`."""
    from dsv3_jax.data.tokenizer import load_tokenizer
    from dsv3_jax.export.load import find_tokenizer, load
    from dsv3_jax.serve.sampler import SamplingParams
    from dsv3_jax.serve.text import continue_text

    params = [
        SamplingParams(
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=seed
        )
        for seed in range(options.seed, options.seed + len(options.prompt or [None]))
    ]
    path = Path(options.checkpoint)
    tokenizer_path = find_tokenizer(path)
    if tokenizer_path is None:
        raise ValueError(f"{path} has no tokenizer.json, expected one to read prompts with")
    model = load(path, dtype=options.dtype)
    tokenizer = load_tokenizer(tokenizer_path, model.config.vocab_size)
    if options.prompt is None and sys.stdin.isatty():
        print("dsv3 generate: reading the prompt, to the end of the file", file=sys.stderr)
    prompts = options.prompt or [sys.stdin.read().removesuffix("\n")]
    texts = [  # nothing runs yet, but what is wrong with any of them is said before the first
        continue_text(model, tokenizer, prompt, options.max_new_tokens, sampling, options.stop)
        for prompt, sampling in zip(prompts, params, strict=True)
    ]
    for number, (prompt, pieces) in enumerate(zip(prompts, texts, strict=True)):
        print("\n" * (2 * (number > 0)) + prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
    return 0


def run_serve(options: argparse.Namespace) -> int:
    """`dsv3 serve`."""
    config = apply_overrides(ServerConfig(), options.set)
    serve_config, devices = config.serve, config.parallel.simulated_devices
    if serve_config.disaggregated:  # processes of units simulate their own
        of_prefill = config.prefill_parallel.simulated_devices
        devices = 0 if serve_config.unit_processes else of_prefill + devices
    simulate_devices(devices)

    from dsv3_jax.serve.server.command import run as serve

    return serve(options, config, _load_to_serve)


def _load_to_serve(path: Path, config: ServerConfig):
    """A checkpoint behind an engine that has not started."""
    from dsv3_jax.data.tokenizer import load_tokenizer
    from dsv3_jax.export.load import find_tokenizer, load, read_model_config
    from dsv3_jax.serve.disaggregated.coordinator import Coordinator
    from dsv3_jax.serve.disaggregated.one_process import load_two_meshes
    from dsv3_jax.serve.engine_thread import EngineThread
    from dsv3_jax.serve.load_engine import load_engine
    from dsv3_jax.serve.server.command import Loaded

    file = find_tokenizer(path)
    if file is None:
        raise ValueError(f"{path} has no tokenizer.json, expected one to read prompts with")
    model_config = read_model_config(path)
    config.check_model(model_config)
    load_model = partial(load, path, dtype=config.serve.dtype)
    if config.serve.disaggregated and config.serve.unit_processes:  # each unit loads it
        backend = Coordinator(model_config, config, load_model)
    else:
        load_whole = load_two_meshes if config.serve.disaggregated else load_engine
        backend = EngineThread(load_whole(load_model, config, model_config.n_routed_experts))
    return Loaded(
        backend=backend,
        tokenizer=load_tokenizer(file, model_config.vocab_size),
        directory=file.parent,
        name=path.resolve().name,
        vocab_size=model_config.vocab_size,
        stop_tokens=model_config.end_tokens,
    )


def run_import(options: argparse.Namespace) -> int:
    """`dsv3 import`."""
    from dsv3_jax.export.load import import_hf

    step = import_hf(Path(options.source), Path(options.target))
    print(f"{step}: train with --set train.init_from={options.target}, or dsv3 generate")
    return 0


def run_export(options: argparse.Namespace) -> int:
    """`dsv3 export`."""
    from dsv3_jax.export.huggingface import save_hf
    from dsv3_jax.export.load import load

    target = Path(options.target)
    save_hf(load(options.checkpoint, dtype="float32"), target, weights=options.weights)
    print(f"{target}: {options.weights} safetensors for Hugging Face")
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """`dsv3 bench`."""
    if options.what == "serve":
        from dsv3_jax.plan.bench_serve import run as bench_serve

        return bench_serve(options)
    if options.repeats < 1:
        raise ValueError(f"--repeats is {options.repeats}, expected at least 1")
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}, expected at least 1")
    only_kernels = {"--static": options.static, "--op": options.op, "--write": options.write}
    if options.what == "kernels":
        others = {"--config": options.config, "--batch-size": options.batch_size}
        _refuse(others | {"--set": options.set}, "train and decode")
        return _bench_kernels(options)
    _refuse(only_kernels, "kernels")
    options.config = BENCH_CONFIG if options.config is None else options.config
    config = _config(options)
    config.check_is_training()

    simulate_devices(config.parallel.simulated_devices)
    from dsv3_jax.plan.bench import bench_decode, bench_train, print_report

    run = bench_train if options.what == "train" else bench_decode
    report = run(config, options.batch_size, options.repeats)
    print_report(report, as_json=options.json)
    return 0


def _refuse(given: dict[str, Any], of: str) -> None:
    """ValueError for an option of another bench that is there."""
    if name := next((name for name, value in given.items() if value), None):
        raise ValueError(f"{name} is of the bench of {of}, expected none")


def _bench_kernels(options: argparse.Namespace) -> int:
    if options.write is not None and not options.static:
        raise ValueError("--write is of what is compiled, expected --static too")
    if options.static:
        os.environ["JAX_PLATFORMS"] = "cpu"  # the GPU compiled for is not this machine's

    from dsv3_jax.plan.bench_kernels import bench_static, bench_timed

    if options.static:
        bench_static(options.op, as_json=options.json, readme=options.write)
    else:
        bench_timed(options.op, options.repeats, as_json=options.json)
    return 0


def run_compile(options: argparse.Namespace) -> int:
    """`dsv3 compile`. A step that does not fit the GPU is a result, not an error."""
    config = _config(options)

    from dsv3_jax.plan import report, unit_step
    from dsv3_jax.plan.hardware import find_gpu
    from dsv3_jax.plan.step_report import compile_step, dump
    from dsv3_jax.train.mesh_step import lower_train_step

    gpu = find_gpu(options.gpu)
    if config.serve.unit is None:
        compiled, analysis = compile_step(config, gpu, options.hosts, lower_train_step)
        as_json, text = report.as_json(analysis.report), report.as_text(analysis.report)
    else:
        compiled, of_unit = unit_step.compile_unit(config, gpu, options.hosts)
        analysis, as_json = of_unit.analysis, unit_step.as_json(of_unit)
        text = unit_step.as_text(of_unit)
    if options.dump is not None:
        for path in dump(Path(options.dump), compiled, analysis, as_json):
            print(f"dsv3 compile: wrote {path}", file=sys.stderr)
    print(json.dumps(as_json) if options.json else text.rstrip("\n"))
    return 0


def _add_plan(plan: Parser) -> None:
    from dsv3_jax.plan.planner_commands import add_arguments

    add_arguments(plan)


def run_plan(options: argparse.Namespace) -> int:
    """`dsv3 plan`."""
    from dsv3_jax.plan.planner_commands import run

    return run(options)


def run_schedule(options: argparse.Namespace) -> int:
    """`dsv3 schedule`."""
    from dsv3_jax.plan.schedule_report import parse_durations, print_schedule

    print_schedule(
        options.name,
        options.stages,
        options.micro_batches,
        parse_durations(options.durations),
        png=options.png,
        as_json=options.json,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run())
