"""The options of `dsv3 serve`, apart from what it imports: every command's help needs them."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dsv3 serve`."""
    parser.add_argument("checkpoint", help="a run directory, a step of it, or Hugging Face's")
    parser.add_argument("--host", default="127.0.0.1", help="(default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument("--name", help="the model's id for clients (default: the directory's name)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change the config; repeatable, e.g. --set serve.slots=8",
    )
