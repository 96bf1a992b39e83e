"""A request whose prompt is read, on its way from one engine to another.

On the wire, after a handshake in which both name the layout of their pages, a handover is

    header | page 0 | page 1 | ...          each: 16 bytes of checksum, then the content

and is answered with None, or with why it was refused. The checksum is of the content and of its
place, so that neither a flipped bit nor two pages in the wrong order go unseen.
"""

import hashlib
import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
from jaxtyping import Shaped

from dsv3_jax.serve.request import Request

CHECKSUM_BYTES = 16


class HandoverError(Exception):
    """A handover did not arrive as it was sent."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the content of a page is made of."""

    layers: int
    page_size: int
    """Tokens."""
    row: int
    """Values of a token and layer."""
    dtype: str


@dataclass(frozen=True)
class Handover:
    """A request with the latents of all its tokens but the last."""

    request: Request
    made: tuple[int, ...]
    """Of its answer, by an engine before."""
    found: int
    """Tokens of the prompt that were in the cache of prefixes."""
    pages: tuple[Shaped[np.ndarray, "layers page_size row"], ...]
    """The last one may be full in part."""


def introduce(connection: Connection, layout: Layout) -> None:
    """The sender's handshake. Raises HandoverError if the receiver has another layout."""
    connection.send(layout)
    refusal = connection.recv()
    if refusal is not None:
        raise HandoverError(refusal)


def welcome(connection: Connection, layout: Layout) -> bool:
    """The receiver's handshake: whether handovers may follow."""
    theirs = connection.recv()
    is_same = theirs == layout
    connection.send(None if is_same else f"pages are {theirs} there, expected {layout}")
    return is_same


def send(connection: Connection, handover: Handover) -> None:
    """Sends a handover and waits for its answer. Raises HandoverError if it was refused."""
    head = handover.request, handover.made, handover.found, len(handover.pages)
    connection.send_bytes(_sealed(0, pickle.dumps(head)))
    for place, page in enumerate(handover.pages, 1):
        connection.send_bytes(_sealed(place, page.tobytes()))
    refusal = connection.recv()
    if refusal is not None:
        raise HandoverError(refusal)


def receive(connection: Connection, layout: Layout) -> Handover:
    """The next handover, to be answered by `answer`.

    Raises HandoverError for one whose pages have changed on the way, once all of it is read;
    EOFError or OSError where the connection has ended, or cannot go on: with a damaged header
    nobody knows how many pages there are.
    """
    try:
        request, made, found, count = pickle.loads(_opened(0, connection.recv_bytes()))
    except HandoverError as error:
        raise ConnectionError(str(error)) from error
    pages, damage = [], None
    for place in range(1, count + 1):
        try:
            content = _opened(place, connection.recv_bytes())
            pages.append(_page(content, layout))
        except HandoverError as error:
            damage = error
    if damage is not None:
        raise damage
    return Handover(request, made, found, tuple(pages))


def answer(connection: Connection, refusal: str | None) -> None:
    """Tells the sender that the handover has arrived, or why not."""
    connection.send(refusal)


def _page(content: bytes, layout: Layout) -> np.ndarray:
    shape = layout.layers, layout.page_size, layout.row
    dtype = np.dtype(layout.dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    if len(content) != size:
        raise HandoverError(f"a page has {len(content)} bytes, expected {size}")
    return np.frombuffer(content, dtype).reshape(shape)


def _checksum(place: int, content: bytes) -> bytes:
    key = place.to_bytes(8, "little")
    return hashlib.blake2b(content, digest_size=CHECKSUM_BYTES, key=key).digest()


def _sealed(place: int, content: bytes) -> bytes:
    return _checksum(place, content) + content


def _opened(place: int, sealed: bytes) -> bytes:
    content = sealed[CHECKSUM_BYTES:]
    if sealed[:CHECKSUM_BYTES] != _checksum(place, content):
        what = f"page {place - 1}" if place else "the header"
        raise HandoverError(f"{what} of a handover has another checksum than it was sent with")
    return content
