"""`dsv3 plan`: what clusters, networks and models cost together. Imports no JAX."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from dsv3_jax.config import RunConfig, apply_overrides, read_config
from dsv3_jax.plan.network import commands as network
from dsv3_jax.plan.table import Table

TABLES = ("kv", "flops", "limits", "network", "mpft", "serve", "checks")
EXAMPLES = """examples:
  dsv3 plan table kv
  dsv3 plan train configs/v3_671b.py --cluster h800_2048 --html plan.html
  dsv3 plan serve configs/v3_671b.py --cluster h800_2048 --input 4000 --output 1000 --slo-tpot 50
  dsv3 plan sweep configs/v3_671b.py --cluster h800_2048 --vary parallel.pipe=8,16
  dsv3 plan search configs/v3_671b.py --cluster h800_2048
  dsv3 plan limits local deepseek-v3 --bandwidth 1000 --bits 4.5"""
Run = Callable[[argparse.Namespace], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Puts the planner's subcommands under `parser`."""
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="plan_command", metavar="WHAT", required=True)

    def command(name: str, run: Run, summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=summary, description=summary)
        made.set_defaults(plan=run)
        return made

    table = command("table", run_table, "A published table beside our figures.")
    table.add_argument("name", choices=TABLES)
    _add_outputs(table, pictures=False)

    cluster = command("cluster", run_cluster, "A cluster's figures and where they are from.")
    cluster.add_argument("name", nargs="?", help="a name or a .toml file (default: list them)")
    _add_outputs(cluster, pictures=False)

    _add_limits(command("limits", run_limits, "Upper bounds of decoding."))
    _add_train(command("train", run_train, "Step time, days and dollars of a training run."))
    _add_serve(command("serve", run_serve, "Latency and throughput of a service."))
    _add_sweep(command("sweep", run_sweep, "What a run takes when one thing is another."))
    _add_search(command("search", run_search, "Layouts of a run that fit, best first."))

    network.add_arguments(command("network", network.run, "Traffic on a network's links."))


def run(options: argparse.Namespace) -> int:
    """The subcommand that was chosen; its exit code."""
    return options.plan(options)


def _add_outputs(command: argparse.ArgumentParser, *, pictures: bool = True) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object only")
    if pictures:
        command.add_argument("--png", type=Path, metavar="FILE", help="draw it")
        command.add_argument("--html", type=Path, metavar="FILE", help="write a page")


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", help="a Python file with `def config() -> RunConfig`")
    command.add_argument("--cluster", required=True, help="a name, or a .toml file of your own")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change the config; repeatable",
    )


def _add_limits(command: argparse.ArgumentParser) -> None:
    kinds = command.add_subparsers(dest="limit", metavar="WHAT", required=True)
    decode = kinds.add_parser("decode", help="by the experts' rows on the network")
    decode.add_argument("--hidden", type=int, default=7000, help="(default 7000, as the paper)")
    decode.add_argument("--tokens", type=float, default=32, help="of a device (default 32)")
    decode.add_argument("--sends", type=int, default=9, help="experts of a token (default 9)")
    decode.add_argument("--dispatch-bytes", type=float, default=1, help="of a value (default 1)")
    decode.add_argument("--combine-bytes", type=float, default=2, help="of a value (default 2)")
    decode.add_argument("--bandwidth", type=float, default=50, help="GB/s, one way (default 50)")
    decode.add_argument("--latency", type=float, default=0, help="us a transfer (default 0)")
    decode.add_argument("--micro-batches", type=int, default=2, help="(default 2)")
    decode.add_argument("--layers", type=int, default=61, help="(default 61)")
    _add_outputs(decode, pictures=False)
    local = kinds.add_parser("local", help="by one machine's memory")
    local.add_argument("model", help="deepseek-v3, ..., or a config.json")
    local.add_argument("--bandwidth", type=float, required=True, help="GB/s of the memory")
    local.add_argument("--bits", type=float, default=4.5, help="of a weight (default 4.5)")
    local.add_argument("--context", type=int, default=4096, help="tokens (default 4096)")
    local.add_argument("--efficiency", type=float, default=1, help="of the bandwidth (default 1)")
    local.add_argument("--acceptance", type=float, default=0, help="of a drafted token (default 0)")
    _add_outputs(local, pictures=False)
    unit = kinds.add_parser("unit", help="what a prefill or decode unit has room for")
    _add_run(unit)
    unit.add_argument("--gpus", type=int, required=True, help="that share the experts")
    unit.add_argument("--redundant", type=int, default=32, help="experts held twice (default 32)")
    unit.add_argument("--cache", default="bf16", help="bf16 (default), fp8, int8 or int4")
    _add_outputs(unit, pictures=False)


def _add_train(command: argparse.ArgumentParser) -> None:
    _add_run(command)
    command.add_argument("--tokens", type=float, help="of the whole run (default: its steps')")
    command.add_argument(
        "--imbalance", type=float, default=1, help="busiest GPU's rows over the mean (default 1)"
    )
    command.add_argument(
        "--compiled", type=Path, metavar="DIR", help="what `dsv3 compile --dump` wrote of it"
    )
    _add_outputs(command)


def _add_serve(command: argparse.ArgumentParser) -> None:
    _add_run(command)
    command.add_argument("--input", type=int, required=True, help="tokens of a prompt")
    command.add_argument("--output", type=int, required=True, help="tokens of an answer")
    command.add_argument("--slo-tpot", type=float, help="ms an output token at most")
    command.add_argument("--slo-ttft", type=float, help="ms to the first token at most")
    command.add_argument("--acceptance", type=float, default=0, help="of MTP's token (default 0)")
    command.add_argument("--prefix-hit", type=float, default=0, help="share cached (default 0)")
    command.add_argument("--prefill-gpus", type=int, default=32, help="of a unit (default 32)")
    command.add_argument("--decode-gpus", type=int, default=144, help="of a unit (default 144)")
    command.add_argument(
        "--redundant", type=int, default=32, help="experts held twice (default 32)"
    )
    command.add_argument("--cache", default="bf16", help="bf16 (default), fp8, int8 or int4")
    command.add_argument(
        "--imbalance", type=float, default=1, help="busiest GPU's rows over the mean (default 1)"
    )
    _add_outputs(command, pictures=False)


def _add_sweep(command: argparse.ArgumentParser) -> None:
    _add_run(command)
    command.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="FIELD=A,B,C",
        help="cluster.*, gpu.* or a field of the config; twice for all pairs",
    )
    command.add_argument("--tokens", type=float, help="of the whole run (default: its steps')")
    _add_outputs(command)


def _add_search(command: argparse.ArgumentParser) -> None:
    _add_run(command)
    command.add_argument("--top", type=int, default=10, help="layouts to show (default 10)")
    command.add_argument("--tokens", type=float, help="of the whole run (default: its steps')")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    _add_outputs(command, pictures=False)


def _config(options: argparse.Namespace) -> RunConfig:
    return apply_overrides(read_config(options.config), options.set)


def _print_table(table: Table, options: argparse.Namespace) -> int:
    print(json.dumps(table.as_json()) if options.json else table.as_text())
    return 0


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    print(f"dsv3 plan: wrote {path}", file=sys.stderr)


def run_table(options: argparse.Namespace) -> int:
    """`dsv3 plan table`."""
    from dsv3_jax.plan import published_tables as tables

    made = {
        "kv": tables.kv_table,
        "flops": tables.flops_table,
        "limits": tables.limits_table,
        "network": tables.network_table,
        "mpft": tables.step_table,
        "serve": tables.serve_table,
        "checks": tables.checks_table,
    }
    return _print_table(made[options.name](), options)


def run_cluster(options: argparse.Namespace) -> int:
    """`dsv3 plan cluster`."""
    from dsv3_jax.plan.cluster_table import cluster_list, cluster_table

    table = cluster_list() if options.name is None else cluster_table(options.name)
    return _print_table(table, options)


def run_limits(options: argparse.Namespace) -> int:
    """`dsv3 plan limits`."""
    from dsv3_jax.plan.limit_tables import decode_table, local_table, unit_table

    made = {"decode": decode_table, "local": local_table, "unit": unit_table}
    if options.limit == "unit":
        options.config = _config(options)
    return _print_table(made[options.limit](options), options)


def run_train(options: argparse.Namespace) -> int:
    """`dsv3 plan train`. A run that does not fit is a result, not an error."""
    from dsv3_jax.plan.cluster import find_cluster
    from dsv3_jax.plan.compiled_work import read_report
    from dsv3_jax.plan.train_plan import predict_training
    from dsv3_jax.plan.train_report import as_json, as_text

    plan, detail = predict_training(
        _config(options),
        find_cluster(options.cluster),
        tokens=options.tokens,
        imbalance=options.imbalance,
        compiled=None if options.compiled is None else read_report(options.compiled),
    )
    if options.png is not None:
        from dsv3_jax.plan.draw_schedule import draw_png

        draw_png(detail.timeline, options.png)
        print(f"dsv3 plan: wrote {options.png}", file=sys.stderr)
    if options.html is not None:
        from dsv3_jax.plan.plan_page import train_page

        _write(options.html, train_page(plan, detail))
    print(json.dumps(as_json(plan)) if options.json else as_text(plan).rstrip("\n"))
    return 0


def run_serve(options: argparse.Namespace) -> int:
    """`dsv3 plan serve`."""
    from dsv3_jax.plan.cluster import find_cluster
    from dsv3_jax.plan.serve_plan import Layout, Load, as_json, as_text, predict_serving

    def seconds(milliseconds: float | None) -> float | None:
        return None if milliseconds is None else milliseconds / 1e3

    load = Load(
        input_tokens=options.input,
        output_tokens=options.output,
        slo_tpot_seconds=seconds(options.slo_tpot),
        slo_ttft_seconds=seconds(options.slo_ttft),
        acceptance=options.acceptance,
        prefix_hit=options.prefix_hit,
    )
    layout = Layout(
        prefill_gpus=options.prefill_gpus,
        decode_gpus=options.decode_gpus,
        redundant=options.redundant,
        cache=options.cache,
        imbalance=options.imbalance,
    )
    plan = predict_serving(_config(options), find_cluster(options.cluster), load, layout)
    print(json.dumps(as_json(plan)) if options.json else as_text(plan))
    return 0


def run_sweep(options: argparse.Namespace) -> int:
    """`dsv3 plan sweep`."""
    from dsv3_jax.plan.cluster import find_cluster
    from dsv3_jax.plan.sweep import Vary, draw_sweep, sweep, sweep_table

    varied = [Vary.parse(text) for text in options.vary]
    points = sweep(_config(options), find_cluster(options.cluster), varied, tokens=options.tokens)
    table = sweep_table(points, varied)
    if options.png is not None:
        draw_sweep(points, varied, options.png)
        print(f"dsv3 plan: wrote {options.png}", file=sys.stderr)
    if options.html is not None:
        from dsv3_jax.plan.plan_page import sweep_page

        _write(options.html, sweep_page(table, points))
    return _print_table(table, options)


def run_search(options: argparse.Namespace) -> int:
    """`dsv3 plan search`."""
    from dsv3_jax.plan.cluster import find_cluster
    from dsv3_jax.plan.search import search, search_table

    cluster = find_cluster(options.cluster)
    found = search(_config(options), cluster, top=options.top, tokens=options.tokens)
    table = search_table(found)
    if options.html is not None:
        from dsv3_jax.plan.plan_page import search_page

        _write(options.html, search_page(table, found))
    return _print_table(table, options)
