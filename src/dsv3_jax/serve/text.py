"""Text in, text out, piece by piece."""

from collections.abc import Iterator, Sequence

from dsv3_jax.data.tokenizer import StreamDecoder, Tokenizer
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.serve.generate import check_prompts, stream
from dsv3_jax.serve.sampler import SamplingParams
from dsv3_jax.serve.stops import StopFinder

STREAM_STEPS = 4
"""Tokens between two pieces of text."""


def continue_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    params: SamplingParams,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """The continuation of `prompt` in pieces of whole characters.

    Ends before the first of the `stop` texts; text that may be the beginning of one is held back.
    Raises ValueError, before the first piece, for what the model cannot continue.
    """
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(f"prompt is {prompt!r}, expected UTF-8 text")
    tokens = tokenizer.encode_prompt(prompt)
    if not prompt or not tokens:
        raise ValueError(f"prompt is {prompt!r}, expected text of at least one token")
    if any(text == "" for text in stop):
        raise ValueError("stop is '', expected text of at least one character")
    check_prompts(model, [tokens], max_new_tokens)
    pieces = _decode(tokenizer, stream(model, [tokens], max_new_tokens, params, steps=STREAM_STEPS))
    return until_stop(pieces, stop)


def _decode(tokenizer: Tokenizer, batches: Iterator[list[list[int]]]) -> Iterator[str]:
    decoder = StreamDecoder(tokenizer)
    for (row,) in batches:
        for token in row:
            yield decoder.step(token)
    yield decoder.finish()


def until_stop(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The text of `pieces` up to the first occurrence of any of `stop`.

    >>> list(until_stop(iter(["one tw", "o three"]), ["two"]))
    ['one ']
    """
    finder = StopFinder(stop)
    for piece in pieces:
        if text := finder.push(piece):
            yield text
        if finder.found:
            return
    if text := finder.finish():
        yield text
