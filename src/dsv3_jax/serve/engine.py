"""The engine: requests in, tokens out, one step at a time.

    step:  admit -> move pages -> read chunks of prompts -> decode -> outputs

The host knows every request's state (scheduler.py); a step gives the device small arrays of it and
takes back the tokens. While requests are decoded a step reads no longer than it decodes, so that
nobody's answer slows to less than half because another's prompt is long.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import ModelConfig, ServeConfig
from dsv3_jax.config.checks import require
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.serve.disaggregated.handover import Handover, Layout
from dsv3_jax.serve.pages import PagePool
from dsv3_jax.serve.programs import NO_TOKEN, STOP_TOKENS, EditRows
from dsv3_jax.serve.request import EngineStatistics, Output, Request, TokenLogprobs
from dsv3_jax.serve.runner import Runner
from dsv3_jax.serve.scheduler import Chunk, Scheduler, Sequence
from dsv3_jax.serve.speculative import Payoff

LARGE_ROWS = 4
"""Prompts that are read side by side, where they are short."""


@dataclass
class _Counters:
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    decode_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class Engine:
    """Serves one model. Not for several threads at once: see engine_thread.py.

    `warm_up` compiles every program; `step` may be called then. Raises ValueError where the model
    cannot have the requests that `serve` allows.

    One that `hands_over` decodes nothing: what it has read comes out of `take_handovers`, for
    another's `adopt`.
    """

    def __init__(
        self,
        model: Transformer,
        serve: ServeConfig,
        *,
        hands_over: bool = False,
        compiler_options: dict[str, Any] | None = None,
    ):
        config = model.config
        longest = longest_request(config, serve)
        self.config, self.serve, self.max_seq_len = config, serve, longest
        guesses = serve.speculative and config.num_nextn_predict_layers > 0
        self.runner = Runner(model, serve, guesses=guesses, compiler_options=compiler_options)
        pool = PagePool(
            self.runner.pages,
            serve.page_size,
            keeps_prefixes=serve.prefix_cache,
            host_pages=serve.host_pages,
        )
        self.scheduler = Scheduler([pool], serve.slots, longest)
        self._decode_sizes = _sizes(serve.slots)
        self._chunk_shapes = _chunk_shapes(serve.prefill_chunk, longest)
        self._guess: dict[str, int] = {}
        # Of each row the request, and its number of tokens, that the device's edits are of.
        self._edits_of: dict[int, tuple[str, int]] = {}
        self._seconds: dict[object, float] = {}
        self._payoff = {size: Payoff() for size in self._decode_sizes}
        self._counters = _Counters()
        self._load = np.zeros((config.n_routed_experts,), np.float64)
        self._outputs: list[Output] = []
        self._hands_over = hands_over
        self._handovers: list[Handover] = []
        self._brought: dict[str, Handover] = {}

    def warm_up(self) -> None:
        """Compiles all programs and runs each once."""
        sizes = [] if self._hands_over else self._decode_sizes
        self.runner.compile_all(sizes, self._chunk_shapes)
        for size in sizes:
            for guesses in sorted({False, self.runner.guesses}):
                self.runner.decode(self.runner.empty_rows(size), 1, guesses, None)
        if sizes:
            rows = self.runner.empty_rows(self.serve.slots)
            self.runner.decode(rows, 1, False, self.runner.empty_edits(self.serve.slots))
        for shape in self._chunk_shapes:
            self.runner.read(self.runner.empty_chunks(*shape))
            _, self._seconds[shape] = self.runner.read(self.runner.empty_chunks(*shape))
        _key_data(0)

    # Requests

    def check(self, request: Request) -> None:
        """ValueError for a request that could never be served; from any thread."""
        check_tokens(request, self.config.vocab_size)
        self.scheduler.check_request(request)

    def submit(self, request: Request, made: Many[int] = ()) -> None:
        """Takes a request in, of whose answer `made` is there already; ValueError as `check`, or if
        one of its name is running."""
        self.check(request)
        self.scheduler.add(request, made)

    def cancel(self, request_id: str) -> None:
        """Ends a request, whose output the next step gives; nothing if it has ended already."""
        ended = self.scheduler.cancel(request_id)
        self._counters.cancelled += len(ended)
        self._guess.pop(request_id, None)
        self._brought.pop(request_id, None)
        self._outputs += ended

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._outputs)

    def step(self) -> list[Output]:
        """What a step added to requests."""
        for sequence in self.scheduler.admit():
            handover = self._brought.pop(sequence.request.id, None)
            if handover is not None:
                self._bring(sequence, handover)
                continue
            self._counters.prompt_tokens += len(sequence.request.prompt)
            self._counters.cached_prompt_tokens += sequence.found
        self._read_chunks()
        if self._hands_over:
            self._hand_over()
        else:
            self._decode()
        outputs, self._outputs = self._outputs, []
        return outputs

    def statistics(self) -> EngineStatistics:
        scheduler, pools, c = self.scheduler, self.scheduler.pools, self._counters
        admitted = list(scheduler.sequences)
        reading = sum(sequence.is_reading for sequence in admitted)
        return EngineStatistics(
            waiting=len(scheduler.waiting),
            prefilling=reading,
            running=len(admitted) - reading,
            slots=self.serve.slots * len(pools),
            pages=sum(pool.pages for pool in pools),
            pages_used=sum(pool.used for pool in pools),
            pages_cached=sum(pool.kept for pool in pools),
            host_pages_cached=sum(pool.kept_on_host for pool in pools),
            cache_bytes_per_token=self.runner.cache_bytes_per_token,
            prompt_tokens=c.prompt_tokens,
            cached_prompt_tokens=c.cached_prompt_tokens,
            generated_tokens=c.generated_tokens,
            decode_steps=c.decode_steps,
            drafted_tokens=c.drafted_tokens,
            accepted_tokens=c.accepted_tokens,
            preemptions=scheduler.preemptions,
            finished=c.finished,
            cancelled=c.cancelled,
            compilations=self.runner.compilations,
            prefill_seconds=c.prefill_seconds,
            decode_seconds=c.decode_seconds,
            expert_load=tuple(self._load.tolist()),
            is_speculating=any(payoff.is_on for payoff in self._payoff.values())
            and self.runner.guesses,
        )

    # Reading prompts

    def _read_chunks(self) -> None:
        sequences = list(self.scheduler.sequences)
        left = [len(s.tokens) - 1 - s.cached for s in sequences if s.is_reading]
        if not left:
            return
        is_decoding = len(left) < len(sequences)
        rows, tokens = self._choose_shape(left, is_decoding)
        (chunks,) = self.scheduler.chunks(tokens, rows)
        self._move_pages()
        arrays = self.runner.empty_chunks(rows, tokens)
        for row, chunk in enumerate(chunks):
            self._fill_chunk(arrays, row, chunk)
        load, seconds = self.runner.read(arrays)
        self._add_load(load)
        self._measure((rows, tokens), seconds)
        self._counters.prefill_seconds += seconds
        for chunk in chunks:
            self.scheduler.was_read(chunk)

    def _move_pages(self) -> None:
        (moves,) = self.scheduler.take_moves()
        self.runner.move(moves)

    def _choose_shape(self, left: list[int], is_decoding: bool) -> tuple[int, int]:
        """The shape that reads most tokens a second; while others decode, of those that take no
        longer than a decode call."""
        shapes, seconds = self._chunk_shapes, self._seconds
        if is_decoding and (limit := self._seconds.get("decode")):
            allowed = [shape for shape in shapes if seconds[shape] <= limit]
            shapes = allowed or [min(shapes, key=lambda shape: seconds[shape])]

        def rate(shape: tuple[int, int]) -> float:
            rows, tokens = shape
            return sum(min(tokens, n) for n in left[:rows]) / seconds[shape]

        return max(shapes, key=rate)

    def _fill_chunk(self, arrays, row: int, chunk: Chunk) -> None:
        sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.count
        arrays.tokens[row, : chunk.count] = sequence.tokens[start:end]
        arrays.next_tokens[row, : chunk.count] = sequence.tokens[start + 1 : end + 1]
        arrays.start[row], arrays.count[row] = start, chunk.count
        pages = sequence.holding.pages
        arrays.table[row, : len(pages)] = pages

    # Handing over

    def layout(self) -> Layout:
        """Of the pages that are handed over."""
        content = self.runner.read_pages([0])
        layers, _, page_size, row = content.shape
        return Layout(layers=layers, page_size=page_size, row=row, dtype=str(content.dtype))

    def take_handovers(self) -> list[Handover]:
        """What has been read since the last call."""
        handovers, self._handovers = self._handovers, []
        return handovers

    def adopt(self, handover: Handover) -> None:
        """Takes a request in that another engine has read; it waits for a slot and pages."""
        request = handover.request
        self.scheduler.add(request, handover.made, handover.found)
        self._brought[request.id] = handover

    def _hand_over(self) -> None:
        ready = [s for s in self.scheduler.sequences if not s.is_reading]
        self._move_pages()
        for sequence in ready:
            numbers = sequence.holding.pages[: -(-sequence.cached // self.serve.page_size)]
            pages = ()
            if numbers:  # none of a single token
                content = self.runner.read_pages(numbers)
                pages = tuple(np.moveaxis(content, 1, 0))
            made = tuple(sequence.tokens[len(sequence.request.prompt) :])
            handover = Handover(sequence.request, made, sequence.found, pages)
            self._handovers.append(handover)
            self.scheduler.was_handed_over(sequence)

    def _bring(self, sequence: Sequence, handover: Handover) -> None:
        """Writes the pages that are not known here."""
        self._move_pages()
        first = sequence.cached // self.serve.page_size
        brought = handover.pages[first:]
        if brought:
            numbers = sequence.holding.pages[first : first + len(brought)]
            self.runner.write_pages(numbers, np.stack(brought, axis=1))
        self.scheduler.was_brought(sequence, len(sequence.tokens) - 1)

    # Decoding

    def _decode(self) -> None:
        steps = self.serve.decode_steps
        ready = [s for s in self.scheduler.sequences if not s.is_reading]
        if not ready:
            return
        has_edits = any(_is_edited(s.request) for s in ready)
        if any(s.request.constraint is not None for s in ready):
            steps = 1
        per_step = 2 if self.runner.guesses and not has_edits else 1
        ready = self.scheduler.decoding(steps * per_step)
        self._move_pages()
        if not ready:
            return
        rows_of, size = self._assign_rows(ready, has_edits)
        payoff = self._payoff[size]
        guesses = per_step == 2 and payoff.is_on
        arrays = self.runner.empty_rows(size)
        for row, sequence in rows_of.items():
            self._fill_row(arrays, row, sequence)
        edits = self._edit_rows(rows_of, size) if has_edits else None
        decoded, seconds = self.runner.decode(arrays, steps, guesses, edits)
        self._note(decoded, seconds, payoff, guesses, has_edits)
        for row, sequence in rows_of.items():
            self._take_tokens(sequence, decoded, row)
            if has_edits:
                self._edits_of[row] = sequence.request.id, len(sequence.tokens)

    def _assign_rows(
        self, ready: Many[Sequence], has_edits: bool
    ) -> tuple[dict[int, Sequence], int]:
        """A row for each sequence, and how many rows: its slot where logits are edited, for their
        state is kept by slot, else side by side in as few rows as are compiled."""
        if has_edits:
            return {sequence.slot: sequence for sequence in ready}, self.serve.slots
        size = next(size for size in self._decode_sizes if size >= len(ready))
        return dict(enumerate(ready)), size

    def _fill_row(self, arrays, row: int, sequence: Sequence) -> None:
        request, sampling = sequence.request, sequence.request.sampling
        arrays.is_active[row] = True
        arrays.token[row] = sequence.tokens[-1]
        arrays.position[row] = len(sequence.tokens) - 1
        arrays.guess[row] = self._guess.get(request.id, NO_TOKEN)
        arrays.made[row], arrays.limit[row] = sequence.made, request.max_tokens
        arrays.stop_tokens[row, : len(request.stop_tokens)] = request.stop_tokens
        pages = sequence.holding.pages
        arrays.table[row, : len(pages)] = pages
        arrays.temperature[row], arrays.min_p[row] = sampling.temperature, sampling.min_p
        arrays.top_k[row], arrays.top_p[row] = sampling.top_k, sampling.top_p
        if sampling.temperature > 0:
            arrays.key_data[row] = _key_data(sampling.seed)

    def _edit_rows(self, rows_of: dict[int, Sequence], size: int) -> EditRows:
        arrays, vocab = self.runner.empty_edits(size), self.config.vocab_size
        for row, sequence in rows_of.items():
            request, sampling = sequence.request, sequence.request.sampling
            if self._edits_of.get(row) != (request.id, len(sequence.tokens)):
                counts, in_prompt = np.zeros((vocab,), np.int32), np.zeros((vocab,), bool)
                bias = np.zeros((vocab,), np.float32)
                if _is_edited(request):
                    np.add.at(counts, sequence.tokens[len(request.prompt) :], 1)
                    in_prompt[list(request.prompt)] = True
                    for token, value in sampling.logit_bias:
                        bias[token] = value
                self.runner.set_edits(row, counts, in_prompt, bias)
            arrays.presence[row] = sampling.presence_penalty
            arrays.frequency[row] = sampling.frequency_penalty
            arrays.repetition[row] = sampling.repetition_penalty
            if request.constraint is not None:
                arrays.allowed[row] = request.constraint.allowed()
        return arrays

    def _take_tokens(self, sequence: Sequence, decoded, row: int) -> None:
        request = sequence.request
        tokens = [int(t) for t in decoded.tokens[row] if t != NO_TOKEN]
        logprobs: tuple[TokenLogprobs, ...] = ()
        if request.sampling.logprobs is not None:
            logprobs = tuple(
                _logprobs(decoded, row, i, tokens[i], request) for i in range(len(tokens))
            )
        if request.constraint is not None:
            for token in tokens:
                if token not in request.stop_tokens:
                    request.constraint.accept(token)
        self._guess[request.id] = int(decoded.guess[row])
        self._counters.generated_tokens += len(tokens)
        output = self.scheduler.was_decoded(sequence, tokens, logprobs)
        if output is None:
            return
        if output.finish is not None:
            self._counters.finished += 1
            self._guess.pop(request.id, None)
        self._outputs.append(output)

    # Measuring

    def _note(self, decoded, seconds: float, payoff: "Payoff", guesses: bool, edits: bool) -> None:
        counters, steps = self._counters, int(decoded.steps)
        counters.decode_steps += steps
        counters.decode_seconds += seconds
        counters.drafted_tokens += int(decoded.guessed)
        counters.accepted_tokens += int(decoded.right)
        self._add_load(decoded.load)
        self._measure("decode", seconds)
        if self.runner.guesses and not edits and steps:
            payoff.add(guesses, seconds / steps, int(decoded.guessed), int(decoded.right), steps)

    def _measure(self, what: object, seconds: float) -> None:
        """Running means, quicker to rise: chunks take longer as a prompt goes on."""
        before = self._seconds.get(what, seconds)
        weight = 0.5 if seconds > before else 0.2
        self._seconds[what] = before + weight * (seconds - before)

    def _add_load(self, load: np.ndarray | None) -> None:
        if load is not None:
            self._load += load.sum(axis=0)


def longest_request(config: ModelConfig, serve: ServeConfig) -> int:
    """Tokens of the longest request; ValueError where the model cannot have it."""
    longest, most = serve.longest(config.max_position_embeddings), config.max_position_embeddings
    expected = f"at most the model's max_position_embeddings = {most}"
    require(longest <= most, "serve.max_seq_len", longest, expected)
    return longest


def check_tokens(request: Request, vocab: int) -> None:
    """ValueError for a request with tokens that are not of the vocabulary, or too many that stop
    it."""
    wrong = next((t for t in request.prompt if not 0 <= t < vocab), None)
    require(wrong is None, "prompt: token", wrong, f"a token from 0 to {vocab - 1}")
    wrong = next((t for t, _ in request.sampling.logit_bias if not 0 <= t < vocab), None)
    require(wrong is None, "logit_bias: token", wrong, f"a token from 0 to {vocab - 1}")
    count = len(request.stop_tokens)
    require(count <= STOP_TOKENS, "stop_tokens", count, f"at most {STOP_TOKENS} of them")


def _logprobs(decoded, row: int, place: int, token: int, request: Request) -> TokenLogprobs:
    count = request.sampling.logprobs or 0
    top = zip(decoded.top_tokens[row, place], decoded.top_logprobs[row, place], strict=True)
    alternatives = tuple((int(t), float(p)) for t, p in list(top)[:count])
    return TokenLogprobs(token=token, logprob=float(decoded.logprobs[row, place]), top=alternatives)


def _is_edited(request: Request) -> bool:
    """Whether its logits are edited or looked at."""
    s = request.sampling
    penalties = s.presence_penalty, s.frequency_penalty, s.repetition_penalty - 1
    return (
        any(penalties)
        or bool(s.logit_bias)
        or s.logprobs is not None
        or request.constraint is not None
    )


def _sizes(slots: int) -> list[int]:
    """Rows that decoding is compiled for: 1, 4, 16, ... and all slots.

    >>> _sizes(24)
    [1, 4, 16, 24]
    """
    sizes = [4**power for power in range(slots.bit_length()) if 4**power < slots]
    return [*sizes, slots]


def _chunk_shapes(chunk: int, longest: int) -> list[tuple[int, int]]:
    """(rows, tokens) that reading is compiled for."""
    whole = min(chunk, longest)
    part, least = max(1, whole // 4), max(1, whole // 16)
    return sorted({(1, whole), (1, part), (LARGE_ROWS, part), (1, least)})


def _key_data(seed: int) -> np.ndarray:
    """Of the key that `generate` makes for a single prompt."""
    return np.asarray(jax.random.key_data(jax.random.split(jax.random.key(seed), 1))[0])
