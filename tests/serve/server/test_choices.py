"""Texts of choices: stop texts against `str.partition`, pieces against the whole."""

from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.serve.request import Output, TokenLogprobs
from dsv3_jax.serve.server.choices import Choice
from dsv3_jax.serve.stops import StopFinder

PIECES = st.lists(st.text("ab", max_size=3), max_size=8)


@given(pieces=PIECES, stop=st.text("ab", min_size=1, max_size=4))
def test_text_ends_before_the_stop_however_it_is_cut(pieces, stop):
    finder, out = StopFinder([stop]), ""
    for piece in pieces:
        if not finder.found:
            out += finder.push(piece)
    text = "".join(pieces)
    assert finder.found == (stop in text)
    assert out + ("" if finder.found else finder.finish()) == text.partition(stop)[0]


@given(pieces=PIECES)
def test_the_first_of_several_stops_counts(pieces):
    """Neither contains the other, so the first to begin is the first to end."""
    text = "".join(pieces)
    finder, out = StopFinder(["abb", "baa"]), ""
    for piece in pieces:
        if not finder.found:
            out += finder.push(piece)
    ends = [text.find(stop) for stop in ("abb", "baa") if stop in text]
    expected = text[: min(ends)] if ends else text
    assert out + ("" if finder.found else finder.finish()) == expected


def test_only_what_may_become_a_stop_is_held_back():
    finder = StopFinder(["two"])
    assert [finder.push(piece) for piece in ("one t", "w", "ice", " t")] == [
        *("one ", "", "twice", " "),
    ]
    assert not finder.found


def outputs(tokens, sizes, finish):
    at = 0
    for number, size in enumerate(sizes):
        is_last = number == len(sizes) - 1
        yield Output(
            id="a", tokens=tuple(tokens[at : at + size]), finish=finish if is_last else None
        )
        at += size


@given(text=st.text("the model é漢🙂", max_size=20), step=st.integers(1, 5))
def test_pieces_join_to_the_decoded_tokens(tokenizer, text, step):
    tokens = [*tokenizer.encode(text), tokenizer.eos_id]
    choice = Choice(tokenizer, (), (tokenizer.eos_id,))
    sizes = [len(tokens[at : at + step]) for at in range(0, len(tokens), step)]
    pieces = [choice.push(output) for output in outputs(tokens, sizes, "stop")]
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.finish for piece in pieces] == [None] * (len(sizes) - 1) + ["stop"]
    assert choice.tokens == len(tokens)


def test_bytes_that_become_no_character_come_out_at_the_end(tokenizer):
    tokens = tokenizer.encode("ж")
    assert len(tokens) > 1
    choice = Choice(tokenizer, ["x"], ())
    piece = choice.push(Output(id="a", tokens=tuple(tokens[:1]), finish="length"))
    assert piece.text == "\N{REPLACEMENT CHARACTER}" and piece.finish == "length"


def test_tokens_after_a_stop_text_do_not_count(tokenizer):
    tokens = tokenizer.encode("the model of")
    seen = [tokenizer.decode(tokens[: n + 1]) for n in range(len(tokens))]
    needed = next(n for n, text in enumerate(seen) if "model" in text) + 1
    assert needed < len(tokens)
    details = tuple(TokenLogprobs(token=token, logprob=-1.0) for token in tokens)
    choice = Choice(tokenizer, ["model"], ())
    piece = choice.push(Output(id="a", tokens=tuple(tokens), logprobs=details))
    assert (piece.text, piece.finish, choice.tokens) == ("the ", "stop", needed)
    assert len(piece.details) == needed


def test_a_stop_token_is_neither_text_nor_detail(tokenizer):
    tokens = (*tokenizer.encode("the"), tokenizer.encode("of")[0])
    details = tuple(TokenLogprobs(token=token, logprob=-1.0) for token in tokens)
    choice = Choice(tokenizer, (), tokens[-1:])
    piece = choice.push(Output(id="a", tokens=tokens, logprobs=details, finish="stop"))
    assert piece.text == "the" and len(piece.details) == len(tokens) - 1
    assert choice.tokens == len(tokens)
