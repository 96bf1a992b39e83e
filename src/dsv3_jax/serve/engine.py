"""The engine: requests in, tokens out, one step at a time.

    step:  admit -> move pages -> place experts -> read chunks of prompts -> decode -> outputs

The host knows every request's state (scheduler.py); a step gives the device small arrays of it and
takes back the tokens. How much a step reads beside what it decodes is said by pace.py.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dsv3_jax.config import ModelConfig, ParallelConfig, ServeConfig
from dsv3_jax.config.checks import require
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.inference import expert_devices
from dsv3_jax.parallel.wire import Wire
from dsv3_jax.serve.disaggregated.handover import Handover, Layout
from dsv3_jax.serve.expert_balance import ExpertBalance
from dsv3_jax.serve.pace import FIRST_STEPS, Pace
from dsv3_jax.serve.pages import PagePool
from dsv3_jax.serve.programs import NO_TOKEN, STOP_TOKENS, EditRows
from dsv3_jax.serve.request import EngineStatistics, Output, Request
from dsv3_jax.serve.rows import fill_chunk, fill_row, is_edited, key_data, row_logprobs
from dsv3_jax.serve.runner import Runner
from dsv3_jax.serve.scheduler import Scheduler, Sequence
from dsv3_jax.serve.speculative import Payoff

LARGE_ROWS, MANY_ROWS = 4, 16
"""Prompts that are read side by side, where they are short, and where they are shorter still."""


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
    """Serves one model, each request on one device of its mesh. Not for several threads at once:
    see engine_thread.py.

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
        mesh: Mesh | None = None,
        how: ParallelConfig | None = None,
        wire: Wire | None = None,
        hands_over: bool = False,
        compiler_options: dict[str, Any] | None = None,
    ):
        """On `mesh` (None: where the model is), with the dispatcher and its buffers of `how`, and
        rows on their way to experts and back as `wire` has them."""
        config = model.config
        longest = longest_request(config, serve)
        self.config, self.serve, self.max_seq_len = config, serve, longest
        guesses = serve.speculative and config.num_nextn_predict_layers > 0
        self.runner = Runner(
            model,
            serve,
            guesses=guesses,
            mesh=mesh,
            how=how,
            wire=wire,
            compiler_options=compiler_options,
        )
        pools = [
            PagePool(
                self.runner.pages,
                serve.page_size,
                keeps_prefixes=serve.prefix_cache,
                host_pages=serve.host_pages,
            )
            for _ in range(self.runner.devices)
        ]
        self.scheduler = Scheduler(pools, serve.slots, longest)
        self.balance = _balance(self.runner, serve, config)
        self._decode_sizes = _sizes(serve.slots)
        self._chunk_shapes = _chunk_shapes(serve.prefill_chunk, longest, serve.slots)
        self._guess: dict[str, int] = {}
        # Of each row the request, and its number of tokens, that the device's edits are of.
        self._edits_of: dict[int, tuple[str, int]] = {}
        self._pace = Pace(self._chunk_shapes)
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
            _, seconds = self.runner.read(self.runner.empty_chunks(*shape))
            self._pace.was_read(shape, seconds)
        key_data(0)

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
            self._pace.has_arrived()
            handover = self._brought.pop(sequence.request.id, None)
            if handover is not None:
                self._bring(sequence, handover)
                continue
            self._counters.prompt_tokens += len(sequence.request.prompt)
            self._counters.cached_prompt_tokens += sequence.found
        self._place_experts()
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
            expert_placements=0 if self.balance is None else self.balance.rounds,
            device_load_max_over_mean=1.0 if self.balance is None else self.balance.unevenness(),
            prefill_seconds=c.prefill_seconds,
            decode_seconds=c.decode_seconds,
            expert_load=tuple(self._load.tolist()),
            is_speculating=any(payoff.is_on for payoff in self._payoff.values())
            and self.runner.guesses,
        )

    # Reading prompts

    def _read_chunks(self) -> None:
        spent = 0.0
        while True:
            sequences = list(self.scheduler.sequences)
            left: list[list[int]] = [[] for _ in self.scheduler.pools]
            reading = [s for s in sequences if s.is_reading]
            for sequence in reading:
                left[sequence.device].append(len(sequence.tokens) - 1 - sequence.cached)
            decoding = len(sequences) - len(reading)
            shape = self._pace.choose(left, decoding, spent) if reading else None
            if shape is None:
                return
            spent += self._read(*shape)

    def _read(self, rows: int, tokens: int) -> float:
        """Reads chunks of those that came first; the seconds it took."""
        plan = self.scheduler.chunks(tokens, rows)
        self._move_pages()
        arrays = self.runner.empty_chunks(rows, tokens)
        for device, of_device in enumerate(plan):
            for row, chunk in enumerate(of_device, start=device * rows):
                fill_chunk(arrays, row, chunk)
        load, seconds = self.runner.read(arrays)
        self._add_load(load)
        self._pace.was_read((rows, tokens), seconds)
        self._counters.prefill_seconds += seconds
        for of_device in plan:
            for chunk in of_device:
                self.scheduler.was_read(chunk)
        return seconds

    def _move_pages(self) -> None:
        self.runner.move(self.scheduler.take_moves())

    def _place_experts(self) -> None:
        due = None if self.balance is None else self.balance.next_layer()
        if due is not None:
            self.runner.place_experts(*due)

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
                content = self.runner.read_pages(numbers, sequence.device)
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
            self.runner.write_pages(numbers, np.stack(brought, axis=1), sequence.device)
        self.scheduler.was_brought(sequence, len(sequence.tokens) - 1)

    # Decoding

    def _decode(self) -> None:
        ready = [s for s in self.scheduler.sequences if not s.is_reading]
        if not ready:
            return
        has_edits = any(is_edited(s.request) for s in ready)
        steps = self._steps(ready, has_edits)
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
            guess = self._guess.get(sequence.request.id, NO_TOKEN)
            fill_row(arrays, row, sequence, guess)
        edits = self._edit_rows(rows_of, size) if has_edits else None
        decoded, seconds = self.runner.decode(arrays, steps, guesses, edits)
        self._pace.was_decoded((size, has_edits), int(decoded.steps), seconds)
        self._note(decoded, seconds, payoff, guesses, has_edits)
        for row, sequence in rows_of.items():
            self._take_tokens(sequence, decoded, row)
            if has_edits:
                self._edits_of[row] = sequence.request.id, len(sequence.tokens)

    def _steps(self, ready: Many[Sequence], has_edits: bool) -> int:
        """How many the next call has at most; a grammar says what is allowed for one alone."""
        if any(s.request.constraint is not None for s in ready):
            return 1
        most, slots = self.serve.decode_steps, self.serve.slots * len(self.scheduler.pools)
        if self.scheduler.waiting:  # for the place of the first that ends
            first = min(s.request.max_tokens - s.made for s in ready)
            most = min(most, max(first, FIRST_STEPS))
        _, size = self._assign_rows(ready, has_edits)
        return self._pace.steps((size, has_edits), most, is_full=len(ready) == slots)

    def _assign_rows(
        self, ready: Many[Sequence], has_edits: bool
    ) -> tuple[dict[int, Sequence], int]:
        """A row for each sequence, and how many rows a device has: its slot where logits are
        edited, for their state is kept by slot, else side by side in as few as are compiled."""
        slots = self.serve.slots
        if has_edits:
            return {s.device * slots + s.slot: s for s in ready}, slots
        here: list[list[Sequence]] = [[] for _ in self.scheduler.pools]
        for sequence in ready:
            here[sequence.device].append(sequence)
        most = max(map(len, here))
        size = next(size for size in self._decode_sizes if size >= most)
        rows = ((d * size + i, s) for d, of in enumerate(here) for i, s in enumerate(of))
        return dict(rows), size

    def _edit_rows(self, rows_of: dict[int, Sequence], size: int) -> EditRows:
        arrays, vocab = self.runner.empty_edits(size), self.config.vocab_size
        for row, sequence in rows_of.items():
            request, sampling = sequence.request, sequence.request.sampling
            if self._edits_of.get(row) != (request.id, len(sequence.tokens)):
                counts, in_prompt = np.zeros((vocab,), np.int32), np.zeros((vocab,), bool)
                bias = np.zeros((vocab,), np.float32)
                if is_edited(request):
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
        logprobs = row_logprobs(decoded, row, tokens, request)
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
        if self.runner.guesses and not edits and steps:
            payoff.add(guesses, seconds / steps, int(decoded.guessed), int(decoded.right), steps)

    def _add_load(self, load: np.ndarray | None) -> None:
        if load is not None:
            self._load += load.sum(axis=0)
            if self.balance is not None:
                self.balance.add(load)


def _balance(runner: Runner, serve: ServeConfig, config: ModelConfig) -> ExpertBalance | None:
    """None where experts stay where they are."""
    if runner.placement is None:
        return None
    return ExpertBalance(
        runner.placement,
        groups=config.n_group,
        nodes=int(runner.mesh.shape["node"]),
        gpus=expert_devices(runner.mesh),
        seconds=serve.rebalance_seconds,
    )


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


def _sizes(slots: int) -> list[int]:
    """Rows that decoding is compiled for: 1, 4, 16, ... and all slots.

    >>> _sizes(24)
    [1, 4, 16, 24]
    """
    sizes = [4**power for power in range(slots.bit_length()) if 4**power < slots]
    return [*sizes, slots]


def _chunk_shapes(chunk: int, longest: int, slots: int) -> list[tuple[int, int]]:
    """(rows, tokens) that reading is compiled for.

    >>> _chunk_shapes(256, 1024, 8)
    [(1, 16), (1, 64), (1, 256), (4, 16), (4, 64), (8, 16)]
    """
    whole = min(chunk, longest)
    part, least = max(1, whole // 4), max(1, whole // 16)
    large, many = min(LARGE_ROWS, slots), min(MANY_ROWS, slots)
    alone = {(1, whole), (1, part), (1, least)}
    return sorted(alone | {(large, part), (large, least), (many, least)})
