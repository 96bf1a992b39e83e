"""Which requests run, in which slots and pages: a state machine of plain values. No JAX.

    waiting --admit--> reading its prompt --prefilled--> decoding --> finished
       ^                      |                             |
       +------- preempted: pages taken, tokens kept --------+

Requests are served in the order of their arrival. One is admitted when a slot and the pages of its
prompt are there; while it decodes it takes a page whenever it needs one. When there is none left
the request that came last gives its pages back and waits again, its tokens kept: they are read
again as a prompt would be (and are found in the pages that are known, if these are still kept).

Each device of the mesh has slots and pages of its own; a request stays on the device that it was
admitted to. The last token of a request is not cached: the next decode step begins with it. So a
prompt of n tokens is read up to n - 1, and its last one decodes the first of the answer.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from dsv3_jax.config.checks import require
from dsv3_jax.serve.pages import Holding, Move, PagePool
from dsv3_jax.serve.request import Output, Request


@dataclass(eq=False)
class Sequence:
    """A request with the tokens made so far."""

    request: Request
    tokens: list[int]
    """Prompt and answer."""
    device: int = -1
    slot: int = -1
    """Of the device; -1 while it waits."""
    cached: int = 0
    """Tokens whose latents are in the cache, and final."""
    holding: Holding = field(default_factory=Holding)
    found: int = 0
    """Prompt tokens that were found in known pages when it was first admitted."""
    was_admitted: bool = False
    arrival: int = 0

    @property
    def made(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def is_reading(self) -> bool:
        """Whether it is admitted and has a prompt, or after preemption an answer, to read."""
        return self.slot >= 0 and self.cached < len(self.tokens) - 1

    @property
    def limit(self) -> int:
        """Tokens that it may have at most."""
        return len(self.request.prompt) + self.request.max_tokens


@dataclass(frozen=True)
class Chunk:
    """A part of a sequence to be read: tokens start to start + count - 1."""

    sequence: Sequence
    start: int
    count: int


class Scheduler:
    """Holds every request that has not ended. Methods that end some return their outputs."""

    def __init__(
        self,
        pools: list[PagePool],
        slots: int,
        max_seq_len: int,
    ):
        """One pool and `slots` slots for each device."""
        self.pools, self.slots, self.max_seq_len = pools, slots, max_seq_len
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0
        self._of_slot: list[list[Sequence | None]] = [[None] * slots for _ in pools]
        self._by_id: dict[str, Sequence] = {}
        self._arrivals = 0

    def check_request(self, request: Request) -> None:
        """ValueError for one that could never be served."""
        longest = min(self.max_seq_len, self.pools[0].pages * self.pools[0].page_size)
        total = len(request.prompt) + request.max_tokens
        require(total <= longest, "prompt tokens plus max_tokens", total, f"at most {longest}")

    def add(self, request: Request, made: Iterable[int] = (), found: int | None = None) -> None:
        """Takes a request in, with the tokens that another engine has made of its answer, and how
        much of its prompt that one `found`. ValueError if one of its name is running."""
        require(request.id not in self._by_id, "request id", request.id, "one that is not running")
        self._arrivals += 1
        sequence = Sequence(request, [*request.prompt, *made], arrival=self._arrivals)
        if found is not None:
            sequence.was_admitted, sequence.found = True, found
        self._by_id[request.id] = sequence
        self.waiting.append(sequence)

    def cancel(self, request_id: str, finish: str = "cancelled") -> list[Output]:
        """Ends a request; nothing if it has ended already."""
        sequence = self._by_id.get(request_id)
        return [] if sequence is None else [self._end(sequence, (), finish)]

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    @property
    def sequences(self) -> Iterable[Sequence]:
        """All that are admitted, in the order of their arrival."""
        admitted = (s for of_device in self._of_slot for s in of_device if s is not None)
        return sorted(admitted, key=lambda sequence: sequence.arrival)

    def admit(self) -> list[Sequence]:
        """Gives slots and pages to those that wait, first come first served; who got them."""
        admitted = []
        while self.waiting:
            sequence = self.waiting[0]
            if not self._place(sequence):
                break
            self.waiting.popleft()
            admitted.append(sequence)
        return admitted

    def take_moves(self) -> list[list[Move]]:
        """Of each device, what has to be done with the pages before they are used."""
        return [pool.take_moves() for pool in self.pools]

    def chunks(self, tokens: int, rows: int) -> list[list[Chunk]]:
        """Of each device up to `rows` chunks of up to `tokens` tokens, of those that came first."""
        plan: list[list[Chunk]] = [[] for _ in self.pools]
        for sequence in self.sequences:
            if sequence.is_reading and len(plan[sequence.device]) < rows:
                count = min(tokens, len(sequence.tokens) - 1 - sequence.cached)
                plan[sequence.device].append(Chunk(sequence, sequence.cached, count))
        return plan

    def was_read(self, chunk: Chunk) -> None:
        """The chunk's latents are in the cache."""
        chunk.sequence.cached += chunk.count
        self._publish(chunk.sequence)

    def was_brought(self, sequence: Sequence, cached: int) -> None:
        """Latents of another engine are in the cache, of the first `cached` tokens."""
        sequence.cached = cached
        self._publish(sequence)

    def was_handed_over(self, sequence: Sequence) -> None:
        """Another engine goes on with it: its pages are free, or kept."""
        self._leave(sequence)
        del self._by_id[sequence.request.id]

    def decoding(self, tokens: int) -> list[Sequence]:
        """Those to be decoded, each with pages for `tokens` more tokens.

        Where pages run out those that came last give theirs back and wait again.
        """
        for sequence in self.sequences:
            room = min(len(sequence.tokens) + tokens, sequence.limit)
            while sequence.slot >= 0 and not sequence.is_reading:
                if self.pools[sequence.device].extend(sequence.holding, room):
                    break
                self._preempt(self._last_on(sequence.device))
        return [sequence for sequence in self.sequences if not sequence.is_reading]

    def was_decoded(
        self, sequence: Sequence, tokens: list[int], logprobs: tuple = ()
    ) -> Output | None:
        """Adds tokens that a decode step made, all but the last of them cached; ends the request
        where they say so."""
        sequence.tokens += tokens
        sequence.cached += len(tokens)
        self._publish(sequence)
        if tokens and tokens[-1] in sequence.request.stop_tokens:
            return self._end(sequence, tuple(tokens), "stop", logprobs)
        if sequence.made >= sequence.request.max_tokens:
            return self._end(sequence, tuple(tokens), "length", logprobs)
        if not tokens:
            return None
        return self._output(sequence, tuple(tokens), None, logprobs)

    def check(self) -> None:
        """AssertionError unless slots, pages and requests fit together."""
        for device, pool in enumerate(self.pools):
            here = [s for s in self._of_slot[device] if s is not None]
            assert all(s.device == device and self._of_slot[device][s.slot] is s for s in here)
            pool.check([sequence.holding for sequence in here])
        known = set(map(id, self._by_id.values()))
        assert known == {id(s) for s in (*self.sequences, *self.waiting)}
        assert all(s.slot < 0 and not s.holding.pages for s in self.waiting)

    def _place(self, sequence: Sequence) -> bool:
        """Admits a sequence to the device that knows most of it, then to the emptiest one."""
        free = [of_device.count(None) for of_device in self._of_slot]
        known = [pool.matched(sequence.tokens) for pool in self.pools]
        order = sorted(range(len(free)), key=lambda d: (-known[d], -free[d], d))
        for device in (d for d in order if free[d]):
            # A page more than the prompt needs, or the first step might preempt at once.
            room = min(len(sequence.tokens) + self.pools[device].page_size, sequence.limit)
            taken = self.pools[device].take(sequence.tokens, room)
            if taken is not None:
                sequence.holding, sequence.cached = taken
                sequence.device = device
                sequence.slot = self._of_slot[device].index(None)
                self._of_slot[device][sequence.slot] = sequence
                if not sequence.was_admitted:
                    sequence.was_admitted, sequence.found = True, sequence.cached
                return True
        return False

    def _publish(self, sequence: Sequence) -> None:
        pool = self.pools[sequence.device]
        if sequence.cached // pool.page_size > len(sequence.holding.keys):
            pool.publish(sequence.holding, sequence.tokens[: sequence.cached])

    def _last_on(self, device: int) -> Sequence:
        """Of those on a device the one that came last."""
        here = [sequence for sequence in self.sequences if sequence.device == device]
        return here[-1]

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's slot and pages; it waits before all that came after it."""
        self._leave(sequence)
        self.preemptions += 1
        place = next(
            (i for i, other in enumerate(self.waiting) if other.arrival > sequence.arrival),
            len(self.waiting),
        )
        self.waiting.insert(place, sequence)

    def _leave(self, sequence: Sequence) -> None:
        if sequence.slot >= 0:
            self.pools[sequence.device].release(sequence.holding)
            self._of_slot[sequence.device][sequence.slot] = None
        sequence.slot, sequence.cached = -1, 0

    def _end(
        self, sequence: Sequence, tokens: tuple[int, ...], finish: str, logprobs: tuple = ()
    ) -> Output:
        if sequence.slot >= 0:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)
        del self._by_id[sequence.request.id]
        return self._output(sequence, tokens, finish, logprobs)

    def _output(self, sequence, tokens, finish, logprobs) -> Output:
        return Output(
            id=sequence.request.id,
            tokens=tokens,
            logprobs=logprobs,
            finish=finish,
            cached_tokens=min(sequence.found, len(sequence.request.prompt)),
        )
