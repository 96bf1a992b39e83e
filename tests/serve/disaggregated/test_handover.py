"""Handovers over a socket pair, with somebody in between who changes bytes."""

import hashlib
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np
import pytest

from dsv3_jax.serve.disaggregated.handover import (
    Handover,
    HandoverError,
    Layout,
    answer,
    introduce,
    receive,
    send,
    welcome,
)
from dsv3_jax.serve.request import Request

LAYOUT = Layout(layers=3, page_size=8, row=5, dtype="float32")


def handover(pages: int = 3) -> Handover:
    rng = np.random.default_rng(pages)
    content = rng.normal(size=(pages, 3, 8, 5)).astype(np.float32)
    request = Request(id="a", prompt=tuple(range(20)), max_tokens=4)
    return Handover(request, (1, 2), 8, tuple(content))


def transfer(sent: Handover, change: Callable[[list[bytes]], list[bytes]], then: Handover):
    """Sends one handover whose messages are changed on the way, and then another: what the
    receiver got, and what the sender was told, of each."""
    (sender, near), (far, receiver) = Pipe(), Pipe()
    told, got = [], []

    def relay():
        messages = [near.recv_bytes() for _ in range(1 + len(sent.pages))]
        for message in change(messages):
            far.send_bytes(message)
        near.send_bytes(far.recv_bytes())
        for _ in range(1 + len(then.pages)):
            far.send_bytes(near.recv_bytes())
        near.send_bytes(far.recv_bytes())

    def sending():
        for each in (sent, then):
            try:
                send(sender, each)
                told.append(None)
            except HandoverError as error:
                told.append(str(error))

    threads = [threading.Thread(target=target, daemon=True) for target in (relay, sending)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        try:
            got.append(receive(receiver, LAYOUT))
            answer(receiver, None)
        except HandoverError as error:
            got.append(str(error))
            answer(receiver, str(error))
    for thread in threads:
        thread.join(10)
    for connection in (sender, near, far, receiver):
        connection.close()
    return got, told


def assert_same(found: Handover, wanted: Handover) -> None:
    assert (found.request.id, found.request.prompt) == (wanted.request.id, wanted.request.prompt)
    assert (found.made, found.found) == (wanted.made, wanted.found)
    assert len(found.pages) == len(wanted.pages)
    for a, b in zip(found.pages, wanted.pages, strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


@pytest.mark.parametrize("pages", [0, 1, 3])
def test_arrives_as_it_was_sent(pages):
    sent = handover(pages)
    got, told = transfer(sent, lambda messages: messages, sent)
    assert told == [None, None]
    for each in got:
        assert_same(each, sent)


def flipped(message: bytes, at: int) -> bytes:
    changed = bytearray(message)
    changed[at] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: [m[0], m[1], flipped(m[2], 100), m[3]],  # of the content
        lambda m: [m[0], m[1], flipped(m[2], 3), m[3]],  # of the checksum
        lambda m: [m[0], m[1], flipped(m[2], -1), m[3]],
        lambda m: [m[0], m[2], m[1], m[3]],
        lambda m: [m[0], m[1], m[2][:-4], m[3]],
        lambda m: [m[0], m[1], m[1], m[3]],
    ],
    ids=["content", "checksum", "last byte", "order", "length", "twice"],
)
def test_damage_is_seen_and_the_next_one_arrives(change):
    sent = handover()
    got, told = transfer(sent, change, sent)
    assert "checksum" in got[0] and told[0] == got[0]
    assert_same(got[1], sent)
    assert told[1] is None


def refused(connection: Connection, sent: Handover, error) -> None:
    with pytest.raises(error):
        send(connection, sent)


def test_a_page_of_another_size_is_refused_although_its_checksum_is_right():
    a, b = Pipe()
    whole = handover(1)
    short = Handover(whole.request, (), 0, (whole.pages[0][:, :7],))
    sending = threading.Thread(target=refused, args=[a, short, HandoverError])
    sending.start()
    with pytest.raises(HandoverError, match="a page has 420 bytes, expected 480") as caught:
        receive(b, LAYOUT)
    answer(b, str(caught.value))
    sending.join(10)
    a.close()
    b.close()


def test_a_damaged_header_or_a_cut_stream_ends_the_connection():
    a, b = Pipe()
    content = b"no pickle"
    a.send_bytes(hashlib.blake2b(content, digest_size=16).digest() + content)
    with pytest.raises(ConnectionError, match="the header of a handover has another checksum"):
        receive(b, LAYOUT)
    sending = threading.Thread(target=refused, args=[a, handover(), (EOFError, OSError)])
    sending.start()
    b.recv_bytes()
    b.recv_bytes()
    b.close()
    sending.join(10)
    assert not sending.is_alive()
    a.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_sides_name_their_layout_first(dtype):
    a, b = Pipe()
    theirs = Layout(layers=3, page_size=8, row=5, dtype=dtype)
    answers = []
    welcoming = threading.Thread(target=lambda: answers.append(welcome(b, LAYOUT)))
    welcoming.start()
    if theirs == LAYOUT:
        introduce(a, theirs)
    else:
        with pytest.raises(HandoverError, match=r"dtype='bfloat16'.* expected .*'float32'"):
            introduce(a, theirs)
    welcoming.join(10)
    assert answers == [theirs == LAYOUT]
    a.close()
    b.close()
