"""Who owns which page of the latent cache, and which pages a prompt finds again. No JAX.

A page is free, held by one or more requests, or kept: full, held by nobody, waiting for a prompt
that begins with its tokens. Kept pages are the least recently used first given away; with host
pages their content moves to host memory then, and back when it is asked for. A page is known by its
tokens and all before them:

    key(page i) = blake2b(key(page i - 1), tokens of page i)

A prompt takes over, without copying, every page whose key it finds. Of the page where it departs
from a known one, the tokens before that place are copied with the page (copy on write). At least
the last token of a prompt is always computed, for its output is what the answer begins with.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

ROOT = b""
"""The key before the first page."""


@dataclass(frozen=True)
class CopyPage:
    """Copy a page in every layer, before anything else is written."""

    source: int
    target: int


@dataclass(frozen=True)
class ToHost:
    """Keep a page's content under a key in host memory."""

    page: int
    key: bytes


@dataclass(frozen=True)
class FromHost:
    """Bring content from host memory into a page."""

    key: bytes
    page: int


@dataclass(frozen=True)
class DropHost:
    """Forget what host memory has under a key."""

    key: bytes


Move = CopyPage | ToHost | FromHost | DropHost
"""What has to be done with contents, in this order, before the pages are used."""


@dataclass
class Holding:
    """The pages of one request, in the order of its tokens."""

    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    """Of its first pages, those that are full and known."""


class PagePool:
    """The pages of one device. `moves` collects what has to be done, until `take_moves`."""

    def __init__(self, pages: int, page_size: int, *, keeps_prefixes: bool, host_pages: int = 0):
        self.pages, self.page_size = pages, page_size
        self._keeps_prefixes, self._host_pages = keeps_prefixes, host_pages
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # the next to be given away first
        self._on_host: OrderedDict[bytes, None] = OrderedDict()
        self._tokens_of: dict[bytes, tuple[int, ...]] = {}
        self._parent_of: dict[bytes, bytes] = {}
        self._children: dict[bytes, dict[bytes, None]] = {}
        self._moves: list[Move] = []

    @property
    def used(self) -> int:
        """Pages that requests hold."""
        return self.pages - len(self._free) - len(self._kept)

    @property
    def kept(self) -> int:
        return len(self._kept)

    @property
    def kept_on_host(self) -> int:
        return len(self._on_host)

    @property
    def available(self) -> int:
        """Pages that can be had: free ones and kept ones."""
        return len(self._free) + len(self._kept)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def matched(self, tokens: Sequence[int]) -> int:
        """How many of the tokens, but for the last, are in pages that are known."""
        keys, copied, _ = self._match(tokens)
        return len(keys) * self.page_size + copied

    def take(self, tokens: Sequence[int], room: int) -> tuple[Holding, int] | None:
        """Pages for `room` tokens that begin with `tokens`, and how many of these are known.

        None, and nothing has changed, if there are not as many.
        """
        keys, copied, source = self._match(tokens)
        here = [self._page_of[key] for key in keys if key in self._page_of]
        missing = self.pages_for(room) - len(here)
        available = self.available - sum(page in self._kept for page in here)
        if missing > available:
            return None
        if source in self._kept and missing == available:  # it has to be given away
            copied, source = 0, None
        for page in here:  # first, so that none of them is given away below
            self._hold(page)
        is_pinned = source is not None and self._hold(source)
        for key in keys:
            self._on_host.pop(key, None)
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                page = self._new_page()
                self._moves += [FromHost(key, page), DropHost(key)]
                self._name(page, key)
            pages.append(page)
        new = [self._new_page() for _ in range(self.pages_for(room) - len(pages))]
        if is_pinned:
            assert source is not None
            if new:
                self._moves.append(CopyPage(source, new[0]))
            self._let_go(source)
        found = len(keys) * self.page_size + (copied if new else 0)
        return Holding(pages + new, list(keys)), found

    def extend(self, holding: Holding, room: int) -> bool:
        """Gives a request pages for `room` tokens; False, and nothing has changed, if there are
        not as many."""
        missing = self.pages_for(room) - len(holding.pages)
        if missing > self.available:
            return False
        holding.pages += [self._new_page() for _ in range(missing)]
        return True

    def publish(self, holding: Holding, tokens: Sequence[int]) -> None:
        """Makes a request's full pages known, `tokens` being those whose latents are written."""
        if not self._keeps_prefixes:
            return
        size = self.page_size
        for index in range(len(holding.keys), len(tokens) // size):
            parent = holding.keys[-1] if holding.keys else ROOT
            own = tuple(tokens[index * size : (index + 1) * size])
            key = page_key(parent, own)
            holding.keys.append(key)
            if key not in self._page_of:  # else another request was first: both stay as they are
                if key in self._on_host:
                    self._on_host.pop(key)
                    self._moves.append(DropHost(key))
                self._describe(key, parent, own)
                self._name(holding.pages[index], key)

    def release(self, holding: Holding) -> None:
        """Takes a request's pages back; known ones are kept, the first ones the longest."""
        for page in reversed(holding.pages):
            self._let_go(page)
        holding.pages, holding.keys = [], []

    def take_moves(self) -> list[Move]:
        """The moves since the last call, in order."""
        moves, self._moves = self._moves, []
        return moves

    def check(self, holdings: Sequence[Holding]) -> None:
        """AssertionError unless every page is accounted for, given all holdings there are."""
        holders = [0] * self.pages
        for holding in holdings:
            for page in holding.pages:
                holders[page] += 1
        assert holders == self._holders, "pages are held by other requests than these"
        held = {page for page, count in enumerate(holders) if count}
        places = [*held, *self._free, *self._kept]
        assert sorted(places) == list(range(self.pages)), "a page is lost or in two places"
        assert {self._page_of[key] for key in self._page_of} == set(self._key_of)
        assert set(self._kept) <= set(self._key_of)
        known = set(self._page_of) | set(self._on_host)
        assert set(self._tokens_of) == known and set(self._parent_of) == known

    def _match(self, tokens: Sequence[int]) -> tuple[list[bytes], int, int | None]:
        """Keys of the full pages that are known, and of the next page how many tokens some known
        page on this device begins with, and which."""
        if not self._keeps_prefixes:
            return [], 0, None
        size, usable = self.page_size, len(tokens) - 1
        keys, parent = [], ROOT
        for start in range(0, usable - size + 1, size):
            key = page_key(parent, tokens[start : start + size])
            if key not in self._page_of and key not in self._on_host:
                break
            keys.append(key)
            parent = key
        rest = tuple(tokens[len(keys) * size : min(usable, (len(keys) + 1) * size)])
        best, source = 0, None
        for key in self._children.get(parent, ()):
            page = self._page_of.get(key)
            common = _common(self._tokens_of[key], rest)
            if page is not None and common > best:
                best, source = common, page
        return keys, best, source

    def _new_page(self) -> int:
        """A page without content, held once."""
        if not self._free:
            page, _ = self._kept.popitem(last=False)
            self._forget(page)
            self._free.append(page)
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _forget(self, page: int) -> None:
        """Takes a kept page's name; its content moves to host memory if that has room for any."""
        key = self._key_of.pop(page)
        del self._page_of[key]
        if not self._host_pages:
            self._undescribe(key)
            return
        if len(self._on_host) >= self._host_pages:
            dropped, _ = self._on_host.popitem(last=False)
            self._moves.append(DropHost(dropped))
            self._undescribe(dropped)
        self._on_host[key] = None
        self._moves.append(ToHost(page, key))

    def _hold(self, page: int) -> bool:
        self._holders[page] += 1
        self._kept.pop(page, None)
        return True

    def _let_go(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page]:
            return
        if page in self._key_of:
            self._kept[page] = None
        else:
            self._free.append(page)

    def _name(self, page: int, key: bytes) -> None:
        self._key_of[page] = key
        self._page_of[key] = page

    def _describe(self, key: bytes, parent: bytes, tokens: tuple[int, ...]) -> None:
        self._tokens_of[key], self._parent_of[key] = tokens, parent
        self._children.setdefault(parent, {})[key] = None

    def _undescribe(self, key: bytes) -> None:
        parent = self._parent_of.pop(key)
        del self._tokens_of[key]
        siblings = self._children[parent]
        del siblings[key]
        if not siblings:
            del self._children[parent]


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """What a page is known by: 16 bytes of its tokens and all before them."""
    content = np.asarray(tokens, np.int32).tobytes()
    return hashlib.blake2b(content, digest_size=16, key=parent or b"dsv3").digest()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin alike with."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
