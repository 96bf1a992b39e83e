"""What an engine tells the device of each sequence, and what of its answer is told apart."""

import jax
import numpy as np
from jaxtyping import UInt32

from dsv3_jax.serve.programs import ChunkRows, Decoded, DecodeRows
from dsv3_jax.serve.request import Request, TokenLogprobs
from dsv3_jax.serve.scheduler import Chunk, Sequence


def fill_chunk(arrays: ChunkRows, row: int, chunk: Chunk) -> None:
    """Puts a part of a prompt into a row."""
    sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.count
    arrays.tokens[row, : chunk.count] = sequence.tokens[start:end]
    arrays.next_tokens[row, : chunk.count] = sequence.tokens[start + 1 : end + 1]
    arrays.start[row], arrays.count[row] = start, chunk.count
    pages = sequence.holding.pages
    arrays.table[row, : len(pages)] = pages


def fill_row(arrays: DecodeRows, row: int, sequence: Sequence, guess: int) -> None:
    """Puts a sequence that is to be decoded into a row."""
    request, sampling = sequence.request, sequence.request.sampling
    arrays.is_active[row] = True
    arrays.token[row] = sequence.tokens[-1]
    arrays.position[row] = len(sequence.tokens) - 1
    arrays.guess[row] = guess
    arrays.made[row], arrays.limit[row] = sequence.made, request.max_tokens
    arrays.stop_tokens[row, : len(request.stop_tokens)] = request.stop_tokens
    pages = sequence.holding.pages
    arrays.table[row, : len(pages)] = pages
    arrays.temperature[row], arrays.min_p[row] = sampling.temperature, sampling.min_p
    arrays.top_k[row], arrays.top_p[row] = sampling.top_k, sampling.top_p
    if sampling.temperature > 0:
        arrays.key_data[row] = key_data(sampling.seed)


def key_data(seed: int) -> UInt32[np.ndarray, " words"]:
    """Of the key that `generate` makes for a single prompt."""
    return np.asarray(jax.random.key_data(jax.random.split(jax.random.key(seed), 1))[0])


def is_edited(request: Request) -> bool:
    """Whether its logits are edited or looked at."""
    s = request.sampling
    penalties = s.presence_penalty, s.frequency_penalty, s.repetition_penalty - 1
    return (
        any(penalties)
        or bool(s.logit_bias)
        or s.logprobs is not None
        or request.constraint is not None
    )


def row_logprobs(
    decoded: Decoded, row: int, tokens: list[int], request: Request
) -> tuple[TokenLogprobs, ...]:
    """Of the tokens that a row has made, if the request asks for them."""
    if request.sampling.logprobs is None:
        return ()
    return tuple(_logprobs(decoded, row, i, tokens[i], request) for i in range(len(tokens)))


def _logprobs(decoded, row: int, place: int, token: int, request: Request) -> TokenLogprobs:
    count = request.sampling.logprobs or 0
    top = zip(decoded.top_tokens[row, place], decoded.top_logprobs[row, place], strict=True)
    alternatives = tuple((int(t), float(p)) for t, p in list(top)[:count])
    return TokenLogprobs(token=token, logprob=float(decoded.logprobs[row, place]), top=alternatives)
