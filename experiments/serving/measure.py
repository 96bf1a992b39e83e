"""Three figures of the engine on this machine, without HTTP; docs/LOG.md has what they were.

    python experiments/serving/measure.py streams              16 streams of bench_small against one
    python experiments/serving/measure.py guesses runs/demo    the MTP module's guesses, on and off
    python experiments/serving/measure.py long-prompt          time per token beside a long prompt

Each prints one line a trial. Random weights but for `guesses`. For steady figures `chrt -f 10`.
"""

import argparse
import dataclasses
import importlib
import sys
import time
from pathlib import Path

import numpy as np
from flax import nnx

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]  # for configs

import dsv3_jax  # noqa: E402
from dsv3_jax.config import ServeConfig  # noqa: E402
from dsv3_jax.data.tokenizer import load_tokenizer  # noqa: E402
from dsv3_jax.environment import restart_with_huge_pages  # noqa: E402
from dsv3_jax.model.transformer import Transformer  # noqa: E402
from dsv3_jax.serve.engine import Engine  # noqa: E402
from dsv3_jax.serve.request import Request, SamplingParams  # noqa: E402

TRIALS = 3
PROMPTS = (
    *("def __init__(self, ", "import os\n", "class Foo(", "for i in range("),
    *("    return self.", "if __name__ == ", "try:\n    ", "# This module "),
)


def fresh(config: str, **changes: int) -> Transformer:
    """A model of configs/CONFIG.py with random weights."""
    model = importlib.import_module(f"configs.{config}").config().model
    return Transformer(dataclasses.replace(model, **changes), rngs=nnx.Rngs(0))


def start(model: Transformer, serve: ServeConfig) -> Engine:
    engine = Engine(model, serve)
    engine.warm_up()
    return engine


def random_request(name: str, prompt: int, max_tokens: int, vocab: int, rng) -> Request:
    tokens = tuple(rng.integers(2, vocab, prompt).tolist())
    return Request(id=name, prompt=tokens, max_tokens=max_tokens)


def streams() -> None:
    """Tokens a second, and decoding's share of the time, with one request and with 16."""
    model, rng = fresh("bench_small"), np.random.default_rng(0)
    engine = start(model, ServeConfig(slots=16, max_seq_len=512))
    for count in (1, 16) * TRIALS:
        for i in range(count):
            engine.submit(random_request(str(i), 16, 64, model.config.vocab_size, rng))
        before, started = engine.statistics(), time.perf_counter()
        while engine.has_work:
            engine.step()
        seconds, after = time.perf_counter() - started, engine.statistics()
        decoding = after.decode_seconds - before.decode_seconds
        step = decoding / (after.decode_steps - before.decode_steps)
        print(
            f"{count} streams: {count * 64 / seconds:.0f} tokens/s, {1e3 * step:.1f} ms a step,"
            f" decoding {decoding / seconds:.0%} of the time"
        )


def guesses(checkpoint: str) -> None:
    """Tokens a second one request at a time, and the share of right guesses; are answers equal?"""
    model, tokenizer = dsv3_jax.load(checkpoint), load_tokenizer(checkpoint)
    answers: dict[float, list] = {}
    for speculative in (True, False):
        engine = start(model, ServeConfig(slots=1, max_seq_len=512, speculative=speculative))
        for temperature in (0.0, 0.8):
            before, started, made = engine.statistics(), time.perf_counter(), []
            for seed, text in enumerate(PROMPTS):
                prompt = tuple(tokenizer.encode_prompt(text))
                sampling = SamplingParams(temperature=temperature, seed=seed)
                engine.submit(Request(id="0", prompt=prompt, max_tokens=96, sampling=sampling))
                while engine.has_work:
                    made += [t for output in engine.step() for t in output.tokens]
            seconds, after = time.perf_counter() - started, engine.statistics()
            looked_at = after.drafted_tokens - before.drafted_tokens
            right = (after.accepted_tokens - before.accepted_tokens) / max(looked_at, 1)
            print(
                f"guesses {'on' if speculative else 'off'}, temperature {temperature}:"
                f" {len(made) / seconds:.0f} tokens/s, {right:.0%} of {looked_at} guesses right,"
                f" on at the end: {engine.statistics().is_speculating}"
            )
            answers.setdefault(temperature, []).append(made)
    print("equal answers:", all(one == other for one, other in answers.values()))


def long_prompt() -> None:
    """Gaps between the outputs of 8 streams over their tokens, without and with a prompt of 4,000
    tokens that comes in their midst."""
    model, rng = fresh("bench_tiny", max_position_embeddings=8192), np.random.default_rng(0)
    engine, vocab = start(model, ServeConfig(slots=10, max_seq_len=5000)), model.config.vocab_size
    for trial in range(TRIALS):
        p95 = [_p95_gap(engine, vocab, rng, has_long) for has_long in (False, True)]
        print(f"trial {trial}: p95 {1e3 * p95[0]:.1f} and {1e3 * p95[1]:.1f} ms a token,"
              f" {p95[1] / p95[0]:.2f} times")  # fmt: skip


def _p95_gap(engine: Engine, vocab: int, rng, has_long: bool) -> float:
    for i in range(8):
        engine.submit(random_request(str(i), 16, 500, vocab, rng))
    last: dict[str, float] = {}
    gaps, steps, is_read = [], 0, False
    while engine.has_work:
        if has_long and steps == 30:
            engine.submit(random_request("long", 4000, 2, vocab, rng))
        outputs, now = engine.step(), time.perf_counter()
        steps += 1
        is_read |= any(output.id == "long" for output in outputs)
        counts = steps > 30 and not is_read
        for output in outputs:
            if output.id in last and counts:
                gaps.append((now - last[output.id]) / len(output.tokens))
            last[output.id] = now
    return float(np.percentile(gaps, 95))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("streams")
    what.add_parser("guesses").add_argument("checkpoint")
    what.add_parser("long-prompt")
    options = parser.parse_args()
    restart_with_huge_pages()
    if options.what == "streams":
        streams()
    elif options.what == "guesses":
        guesses(options.checkpoint)
    else:
        long_prompt()


if __name__ == "__main__":
    main()
