"""`dsv3 serve` over the scripted backend, as a process.

Arguments are those of `dsv3 serve`; the checkpoint is a folder with a tokenizer.json, or the word
`broken`, whose engine does not start.
"""

import argparse
import sys
from pathlib import Path

from dsv3_jax.config import ServerConfig, apply_overrides
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.serve.server.command import Loaded, run
from dsv3_jax.serve.server.options import add_arguments
from tests.serve.server.fake_backend import FakeBackend


class BrokenBackend(FakeBackend):
    def start(self, deliver):
        raise MemoryError("there is none left")


def load(path: Path, config: ServerConfig) -> Loaded:
    is_broken = path.name == "broken"
    tokenizer = load_tokenizer(path.parent if is_broken else path)
    backend = (BrokenBackend if is_broken else FakeBackend)(
        script=lambda _: tokenizer.encode("the "),
        slots=config.serve.slots,
        tokens_per_step=1,
        step_seconds=0.02,
    )
    return Loaded(
        backend=backend,
        tokenizer=tokenizer,
        directory=path,
        name=path.name,
        vocab_size=tokenizer.vocab_size,
        stop_tokens=(1,),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args()
    sys.exit(run(options, apply_overrides(ServerConfig(), options.set), load))
