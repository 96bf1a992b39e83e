"""Loads a directory our project exported with transformers; any warning is a failure.

    /tmp/parity/bin/python tests/parity/check_export.py DIRECTORY \
        [--tokens tokens.npy --logits logits.npy]

The environment is make_golden.py's. Prints one JSON object: what was loaded, every message that
transformers logged or warned, missing, unexpected and mismatched keys. Exit status 1 if there is
any. `--tokens` holds integers [batch, length]; float32 logits [batch, length, vocab] are written to
`--logits`. If tokenizer.json is there, AutoTokenizer must read it and encode like it.
"""

import argparse
import json
import logging
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x ** 2  # 12345.678\n",
    " leading space, trailing space \t\n\n",
    "naïve café, 深度求索, Ωμέγα, 🦊",
    "don't DON'T we'll 1000000 3.14",
)


class Messages(logging.Handler):
    """Collects log records of level WARNING and above."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(f"{record.name}: {record.getMessage()}")


@contextmanager
def every_message():
    """Yields a list that fills with what transformers, huggingface_hub and `warnings` say."""
    handler = Messages()
    roots = [logging.getLogger("huggingface_hub"), transformers_logging.get_logger()]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for root in roots:
            root.addHandler(handler)
        try:
            yield handler.texts
        finally:
            for root in roots:
                root.removeHandler(handler)
    handler.texts += [f"{w.category.__name__}: {w.message}" for w in warned]


def load_model(directory: Path):
    """The float32 model and transformers' loading report as {kind: sorted list of keys}.

    Experts run in eager form: grouped_mm, the default, raises on rows that are no multiple of 16
    bytes, such as odd_sizes has.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        experts_implementation="eager",
        output_loading_info=True,
    )
    return model.eval(), {kind: sorted(map(str, keys)) for kind, keys in report.items()}


def compute_logits(model, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits [batch, length, vocab]."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits
    return logits.numpy()


def tokenizer_problems(directory: Path) -> list[str]:
    """Where transformers' tokenizers encode or decode otherwise than tokenizer.json itself."""
    path = directory / "tokenizer.json"
    plain = Tokenizer.from_file(str(path))
    candidates = {
        "AutoTokenizer": AutoTokenizer.from_pretrained(directory),
        "PreTrainedTokenizerFast": PreTrainedTokenizerFast(tokenizer_file=str(path)),
    }
    problems = []
    for name, tokenizer in candidates.items():
        for text in SAMPLES:
            expected = plain.encode(text, add_special_tokens=False).ids
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids != expected:
                problems.append(f"{name} encodes {text!r} as {ids}, tokenizer.json as {expected}")
            elif tokenizer.decode(ids) != plain.decode(expected, skip_special_tokens=False):
                problems.append(f"{name} decodes {text!r} as {tokenizer.decode(ids)!r}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokens", type=Path, help="integers [batch, length], .npy")
    parser.add_argument("--logits", type=Path, help="where float32 logits go, .npy")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    with every_message() as messages:
        model, report = load_model(arguments.directory)
        if arguments.tokens:
            np.save(arguments.logits, compute_logits(model, np.load(arguments.tokens)))
        has_tokenizer = (arguments.directory / "tokenizer.json").exists()
        problems = tokenizer_problems(arguments.directory) if has_tokenizer else []
    result = dict(
        parameters=sum(weight.numel() for weight in model.parameters()),
        has_tokenizer=has_tokenizer,
        messages=messages,
        tokenizer_problems=problems,
    )
    print(json.dumps(result | report, indent=2))
    sys.exit(bool(messages or problems or any(report.values())))


if __name__ == "__main__":
    main()
