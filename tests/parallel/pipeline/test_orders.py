"""The order of actions is the released code's, the papers', and refuses what they do not have."""

from collections import Counter

import pytest
from hypothesis import given

from dsv3_jax.parallel.pipeline.orders import Action, Kind, Layout, Work, make_orders
from tests.parallel.pipeline.cases import schedule_arguments

F, B, INPUT, W, PAIR = (
    Kind.FORWARD,
    Kind.BACKWARD,
    Kind.BACKWARD_INPUT,
    Kind.BACKWARD_WEIGHT,
    Kind.OVERLAPPED,
)


def chunks_of(layout: Layout, action: Action) -> tuple:
    """(kind, chunk of the forward half, chunk of the backward half); None without such a half."""
    halves = (action.forward, action.backward)
    return action.kind, *(None if work is None else layout.chunk_of(work) for work in halves)


def eight_phases(depth: int, half: int, per_chunk: int, near: int) -> list[tuple]:
    """(kind, forward chunk, backward chunk), None for a half that is not there.

    Written from the description of DeepSeek's released step: 2(H-r-1) x F0; (r+1) x F0,F1;
    (H-r-1) x B1 (input),W,F1; (C/2-P+r+1) x F0&B1,F1&B0, the first pair of the middle ranks apart;
    (H-r-1) x B1,F1&B0; (r+1) x B1,B0, the second half of them split; (H-r-1) x W,B0 (input);
    (r+1) x W. r is `depth`, H `half`, C/2 `per_chunk`; 0 is `near`. A W has the chunk of the split
    backward it belongs to, first in, first out.
    """
    far, outer, n = 1 - near, half - depth - 1, depth + 1
    phases = 2 * outer * [(F, near, None)]
    phases += n * [(F, near, None), (F, far, None)]
    phases += outer * [(INPUT, None, far), (W, None, far), (F, far, None)]
    steady = (per_chunk - 2 * half + n) * [(PAIR, near, far), (PAIR, far, near)]
    phases += [(F, near, None), (B, None, far), *steady[1:]] if outer == 0 else steady
    phases += outer * [(B, None, far), (PAIR, far, near)]
    closing = n * [(B, None, far), (B, None, near)]
    split = [(INPUT, None, chunk) for _, _, chunk in closing[n:]]
    phases += closing[:n] + split
    queue = [chunk for _, _, chunk in split] + outer * [near]
    for chunk in queue[:outer]:
        phases += [(W, None, chunk), (INPUT, None, near)]
    return phases + [(W, None, chunk) for chunk in queue[outer:]]


@pytest.mark.parametrize(("ranks", "count"), [(2, 4), (2, 10), (4, 8), (6, 12), (8, 20), (16, 120)])
def test_dualpipe_is_the_released_order(ranks, count):
    layout = Layout("dualpipe", ranks, count)
    for rank, order in enumerate(make_orders(layout)):
        depth, near = min(rank, ranks - 1 - rank), int(rank >= ranks // 2)
        expected = eight_phases(depth, ranks // 2, count // 2, near)
        assert [chunks_of(layout, action) for action in order] == expected


@pytest.mark.parametrize(("ranks", "count"), [(1, 2), (1, 5), (2, 4), (3, 7), (4, 10), (8, 60)])
def test_dualpipev_is_the_released_order(ranks, count):
    layout = Layout("dualpipev", 2 * ranks, count)
    for rank, order in enumerate(make_orders(layout)):
        expected = eight_phases(rank, ranks, count, near=0)
        assert [chunks_of(layout, action) for action in order] == expected


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_counts_of_actions(name):
    """Closed forms for 16 stages, 120 micro-batches; rank 0's are those of the papers' step time
    (facts §7.7): 23 lone forwards, 97 pairs, 23 lone backwards, 15 of them split."""
    layout = Layout(name, 16, 120)
    half, per_chunk = (8, 60) if name == "dualpipe" else (8, 120)
    for rank, order in enumerate(make_orders(layout)):
        depth = min(rank, 15 - rank)
        middle = depth == half - 1
        counts = Counter(action.kind for action in order)
        outer = half - depth - 1
        assert counts[F] == 3 * outer + 2 * (depth + 1) + middle
        assert counts[PAIR] == 2 * (per_chunk - 2 * half + depth + 1) + outer - middle
        assert counts[INPUT] == counts[W] == 2 * outer + depth + 1
        assert counts[B] == outer + depth + 1 + middle
        if name == "dualpipe" and rank in (0, 15):
            assert (counts[F], counts[PAIR], counts[B] + counts[INPUT]) == (23, 97, 23)
            assert counts[W] == 15


def test_dualpipe_is_the_published_figure():
    """8 ranks, 20 micro-batches; the ranks above the middle, read from the figure."""
    layout = Layout("dualpipe", 8, 20)
    letters = {F: "F", B: "B", INPUT: "i", W: "w", PAIR: "&"}
    rows = ["".join(letters[action.kind] for action in order) for order in make_orders(layout)]
    assert rows[:4] == rows[:3:-1]
    assert rows[0] == "FFFFFFFF" + "iwF" * 3 + "&" * 6 + "B&" * 3 + "Bi" + "wi" * 3 + "w"
    assert rows[3] == "FFFFFFFF" + "FB" + "&" * 11 + "BBBB" + "iiii" + "wwww"


def test_1f1b_and_zb1p_written_out():
    def text(name):
        letters = {F: "f", B: "b", INPUT: "i", W: "w"}
        return [
            " ".join(f"{letters[a.kind]}{(a.forward or a.backward or Work(-1, 0))[0]}" for a in row)
            for row in make_orders(Layout(name, 3, 4))
        ]

    assert text("1f1b") == [
        "f0 f1 f2 b0 f3 b1 b2 b3",
        "f0 f1 b0 f2 b1 f3 b2 b3",
        "f0 b0 f1 b1 f2 b2 f3 b3",
    ]
    assert text("zb1p") == [
        "f0 f1 f2 i0 w0 f3 i1 w1 i2 w2 i3 w3",
        "f0 f1 i0 f2 i1 w0 f3 i2 w1 i3 w2 w3",
        "f0 i0 f1 i1 f2 i2 w0 f3 i3 w1 w2 w3",
    ]


@given(schedule_arguments())
def test_every_work_once_and_at_home(arguments):
    layout = Layout(*arguments)
    everything = {
        Work(micro_batch, stage)
        for micro_batch in range(layout.micro_batches)
        for stage in range(layout.stages)
    }
    forward, backward, split, weight = [], [], [], []
    for rank, order in enumerate(make_orders(layout)):
        for action in order:
            works = [work for work in (action.forward, action.backward) if work is not None]
            assert all(layout.rank_of(work) == rank for work in works)
            assert all(layout.stage_of(rank, layout.chunk_of(w)) == w.stage for w in works)
            if action.forward is not None:
                forward.append(action.forward)
            if action.kind in (B, PAIR, INPUT):
                backward.append(action.backward)
            if action.kind == INPUT:
                split.append(action.backward)
            if action.kind == W:
                weight.append(action.backward)
    assert len(forward) == len(backward) == len(everything)
    assert set(forward) == set(backward) == everything
    assert sorted(split) == sorted(weight)


def test_where_stages_and_micro_batches_are():
    down, up = Work(1, 0), Work(4, 0)
    dualpipe = Layout("dualpipe", 4, 8)
    assert (dualpipe.rank_of(down), dualpipe.rank_of(up)) == (0, 3)
    assert [dualpipe.stage_of(1, chunk) for chunk in (0, 1)] == [1, 2]
    dualpipev = Layout("dualpipev", 4, 4)
    assert [dualpipev.rank_of(Work(0, stage)) for stage in range(4)] == [0, 1, 1, 0]
    assert [layout.ranks for layout in (dualpipe, dualpipev)] == [4, 2]


@pytest.mark.parametrize(
    ("arguments", "field", "value", "rule"),
    [
        (("gpipe", 4, 8), "parallel.schedule", "gpipe", "one of 1f1b, zb1p, dualpipe, dualpipev"),
        (("1f1b", 0, 8), "stages", 0, "at least 1"),
        (("zb1p", 4, 0), "parallel.micro_batches", 0, "at least 1"),
        (("dualpipe", 3, 8), "stages", 3, "an even number (dualpipe)"),
        (("dualpipev", 5, 8), "stages", 5, "an even number (dualpipev)"),
        (("dualpipe", 4, 7), "parallel.micro_batches", 7, "at least 8, twice the 4 ranks"),
        (("dualpipe", 4, 9), "parallel.micro_batches", 9, "an even number (dualpipe)"),
        (("dualpipev", 4, 3), "parallel.micro_batches", 3, "at least 4, twice the 2 ranks"),
    ],
)
def test_refuses(arguments, field, value, rule):
    with pytest.raises(ValueError) as raised:
        Layout(*arguments)
    assert str(raised.value).startswith(f"{field} is {value!r}, expected {rule}")
