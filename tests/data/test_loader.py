"""Order, hosts, resumption, mixtures, evaluation, and what wrong data says."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import DataConfig, DataSource
from dsv3_jax.data import loader, sources
from dsv3_jax.data.loader import Loader, PreparedData, TokenRows, prepare

SEQ_LEN = 4


def numbered(count: int, first: int = 0) -> TokenRows:
    """Rows whose tokens are all the row's number, in two arrays."""
    numbers = np.arange(first, first + count, dtype=np.int32)
    rows = np.repeat(numbers[:, None], SEQ_LEN + 1, axis=1)
    cut = count // 3
    return TokenRows((rows[:cut], rows[cut:]), ("first", "second"), vocab_size=100_000)


def data_of(*counts: int, weights=None, shuffle=True, held_out=0) -> PreparedData:
    """Sources of so many numbered rows; source s starts at 1000 * s."""
    weights = weights or [1.0] * len(counts)
    mixture = tuple(DataSource(source="tokens", paths=("x",), weight=w) for w in weights)
    return PreparedData(
        config=DataConfig(mixture=mixture, seq_len=SEQ_LEN, shuffle=shuffle),
        tokenizer=None,
        rows=tuple(numbered(count, 1000 * i) for i, count in enumerate(counts)),
        held_out_rows=numbered(held_out, 9000),
        held_out=(),
    )


def take(source: Loader, *sizes: int) -> list[int]:
    """The row numbers of the next batches of these sizes, in order."""
    return [int(n) for size in sizes for n in source.next_batch(size).tokens[:, 0]]


def test_rows_of_several_arrays_are_one_list():
    rows = numbered(10)
    assert [int(rows[i][0]) for i in range(len(rows))] == list(range(10))
    with pytest.raises(IndexError):
        rows[10]


def test_file_order_without_shuffle():
    source = Loader(data_of(10, shuffle=False), batch_size=4, seed=0)
    batches = [next(source).tokens[:, 0].tolist() for _ in range(5)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]


def test_every_epoch_is_another_permutation():
    source = Loader(data_of(30), batch_size=6, seed=0)
    epochs = [take(source, 30) for _ in range(4)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_is_the_seeds_and_no_seed_repeats_anothers_epochs():
    orders = [take(Loader(data_of(50), 10, seed), 50, 50) for seed in range(4)]
    assert orders[0] == take(Loader(data_of(50), 10, 0), 50, 50)
    epochs = {tuple(order[start : start + 50]) for order in orders for start in (0, 50)}
    assert len(epochs) == 8


def test_one_row_is_enough():
    assert take(Loader(data_of(1), 1, 0), 1, 1, 1) == [0, 0, 0]


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    hosts=st.sampled_from([1, 2, 4]),
    counts=st.sampled_from([(200,), (200, 70), (90, 110, 300)]),
)
def test_hosts_partition_the_same_global_batches(sizes, hosts, counts):
    data = data_of(*counts)
    sizes = [size * hosts for size in sizes]
    alone = Loader(data, 4, 5)
    parts = [Loader(data, 4, 5, index, hosts) for index in range(hosts)]
    for size in sizes:
        whole = alone.next_batch(size).tokens
        split = [part.next_batch(size).tokens for part in parts]
        assert all(len(part) == size // hosts for part in split)
        np.testing.assert_array_equal(np.concatenate(split), whole)
    assert len({json.dumps(part.get_state()) for part in [alone, *parts]}) == 1


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 5))
def test_batch_sizes_do_not_change_the_sequence(sizes, seed):
    data = data_of(170, 50)
    assert take(Loader(data, 4, seed), *sizes) == take(Loader(data, 4, seed), sum(sizes))


@settings(max_examples=25)
@given(
    before=st.lists(st.integers(1, 7), max_size=8),
    after=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    counts=st.sampled_from([(130,), (130, 40), (50, 400, 80)]),
    shuffle=st.booleans(),
)
def test_resumption_continues_with_identical_batches(before, after, counts, shuffle):
    weights = [2.0, 1.0, 0.5][: len(counts)]
    source = Loader(data_of(*counts, weights=weights, shuffle=shuffle), 4, 1)
    take(source, *before)
    state = json.loads(json.dumps(source.get_state()))
    assert state["position"] == sum(before)
    expected = take(source, *after)
    resumed = Loader(data_of(*counts, weights=weights, shuffle=shuffle), 4, 1)
    resumed.set_state(state)
    assert take(resumed, *after) == expected
    source.set_state(state)  # back in the same object
    assert take(source, *after) == expected


@pytest.mark.parametrize(
    ("data", "seed", "named"),
    [
        (data_of(20, 6), 2, "seed is 2, expected 1"),
        (data_of(20, 7), 1, "rows is"),
        (data_of(20, 6, shuffle=False), 1, "shuffle is False, expected True"),
        (data_of(20, 6, weights=[1.0, 2.0]), 1, "weights is"),
        (
            dataclasses.replace(data_of(20, 6), rows=(numbered(20), numbered(6, 1001))),
            1,
            "digests is",
        ),
    ],
)
def test_a_position_in_other_data_is_refused(data, seed, named):
    state = Loader(data_of(20, 6), 4, 1).get_state()
    with pytest.raises(ValueError, match=named):
        Loader(data, 4, seed).set_state(state)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0], [0.7, 0.2, 0.1], [1.0, 1.999]])
def test_mixture_follows_the_weights(weights):
    counts = [400, 100, 50][: len(weights)]
    drawn = take(Loader(data_of(*counts, weights=weights), 4, 0), 1000)
    shares = Counter(number // 1000 for number in drawn)
    for index, weight in enumerate(weights):
        assert abs(shares[index] / 1000 - weight / sum(weights)) < 0.01
        mine = [n - 1000 * index for n in drawn if n // 1000 == index]
        whole = len(mine) // counts[index] * counts[index]
        uses = Counter(mine[:whole])  # epoch after epoch: each row equally often
        assert set(uses.values()) <= {whole // counts[index]}


def test_evaluation_is_fixed_whole_batches_in_order():
    source = Loader(data_of(20, held_out=11), batch_size=4, seed=0)
    first = [batch.tokens[:, 0].tolist() for batch in source.eval_batches(10)]
    assert first == [[9000, 9001, 9002, 9003], [9004, 9005, 9006, 9007]]
    take(source, 4, 4)
    assert [batch.tokens[:, 0].tolist() for batch in source.eval_batches(1)] == first[:1]
    assert source.get_state()["position"] == 8
    second = Loader(data_of(20, held_out=11), 4, 0, process_index=1, process_count=2)
    assert second.eval_batches(1)[0].tokens[:, 0].tolist() == [9002, 9003]


def test_too_little_to_evaluate_or_to_train():
    with pytest.raises(ValueError, match=r"3 held-out rows .* one batch of 4"):
        Loader(data_of(20, held_out=3), 4, 0).eval_batches(1)
    with pytest.raises(ValueError, match="batch_size is 4, expected at most the 3 rows"):
        Loader(data_of(2, 1), 4, 0)


def test_hosts_that_cannot_share_a_batch():
    with pytest.raises(ValueError, match="batch size is 4, expected a multiple of the 3"):
        Loader(data_of(20), 4, 0, process_index=0, process_count=3)
    with pytest.raises(ValueError, match="process_index is 2, expected 0 to 1"):
        Loader(data_of(20), 4, 0, process_index=2, process_count=2)


def text_config(folder: Path, **changes) -> DataConfig:
    fields = {"source": "text", "paths": (f"{folder}/*.txt",), "seq_len": 16, "eval_fraction": 0.2}
    return DataConfig(**{**fields, **changes})


def texts_of(rows: TokenRows, data: PreparedData) -> str:
    """The text of rows that overlap by one token, eos written as |."""
    stream = [int(rows[0][0])] + [int(i) for r in range(len(rows)) for i in rows[r][1:]]
    pieces = "".join("|" if i == data.tokenizer.eos_id else chr(0x1000 + i) for i in stream)
    return "|".join(
        data.tokenizer.decode([ord(c) - 0x1000 for c in part]) for part in pieces.split("|")
    )


def test_text_is_split_tokenised_and_packed(text_folder):
    data = prepare(text_config(text_folder), vocab_size=400)
    assert 262 < data.tokenizer.vocab_size <= 400
    names = {document.name for document in data.held_out}
    assert 0 < len(names) < 20
    training = texts_of(data.rows[0], data)
    held_out = texts_of(data.held_out_rows, data)
    for path in sorted(text_folder.iterdir()):
        first_line = path.read_text(encoding="utf-8").splitlines()[0]
        assert (first_line in held_out) == (path.name in names)
        assert (first_line in training) == (path.name not in names)


def test_prepare_is_deterministic_and_takes_a_ready_tokenizer(text_folder, tokenizer, tmp_path):
    config = text_config(text_folder)
    one, two = prepare(config, 400), prepare(config, 400)
    assert one.rows[0].digest() == two.rows[0].digest()
    one.tokenizer.save(tmp_path / "tokenizer.json")
    from_file = dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer.json"))
    assert prepare(from_file, 400).rows[0].digest() == one.rows[0].digest()
    assert prepare(config, 400, tokenizer=tokenizer).tokenizer is tokenizer
    with pytest.raises(ValueError, match=r"tokenizer\.json: has token ids up to"):
        prepare(from_file, 300)


def test_fill_in_the_middle_is_for_training_alone(text_folder, tokenizer):
    config = text_config(text_folder, fim_rate=1.0)
    data = prepare(config, 400, tokenizer=tokenizer)
    tokens = np.concatenate([data.rows[0][i] for i in range(len(data.rows[0]))])
    assert np.isin([3, 4, 5], tokens).all()
    held_out = data.held_out_rows
    assert not any(np.isin([3, 4, 5], held_out[i]).any() for i in range(len(held_out)))
    again = prepare(config, 400, seed=1, tokenizer=tokenizer)
    assert again.rows[0].digest() != data.rows[0].digest()


def test_documents_of_each_position_only_for_the_mask(text_folder, tokenizer):
    plain = Loader(prepare(text_config(text_folder), 400, tokenizer=tokenizer), 4, 0)
    assert plain.next_batch().documents is None
    config = text_config(text_folder, cross_document_mask=True, seq_len=100)
    batch = Loader(prepare(config, 400, tokenizer=tokenizer), 4, 0).next_batch()
    assert batch.documents.shape == batch.tokens.shape == (4, 101)
    assert (batch.documents[:, 0] == 0).all() and batch.documents.max() > 0
    np.testing.assert_array_equal(
        np.diff(batch.documents, axis=1), batch.tokens[:, :-1] == tokenizer.eos_id
    )


def test_mixture_of_kinds_with_weights(text_folder, jsonl_file, tokenizer):
    mixture = (
        DataSource(source="text", paths=(f"{text_folder}/*.txt",), weight=3.0),
        DataSource(source="jsonl", paths=(str(jsonl_file),), weight=1.0),
    )
    config = DataConfig(mixture=mixture, seq_len=16, eval_fraction=0.2, text_field="body")
    data = prepare(config, 400, tokenizer=tokenizer)
    assert len(data.rows) == 2
    assert {document.name[:5] for document in data.held_out} > {"lines"}
    assert len(Loader(data, 4, 0).next_batch().tokens) == 4


def test_eval_paths_are_held_out_and_not_trained_on(text_folder, jsonl_file):
    config = text_config(text_folder, eval_paths=(f"{text_folder}/0*.txt",))
    data = prepare(config, 400)
    assert [d.name for d in data.held_out] == [f"{i:02}.txt" for i in range(10)]
    training = texts_of(data.rows[0], data)
    assert "# text 5 " not in training and "# text 15 " in training
    mixture = (
        DataSource(source="python_stdlib"),
        DataSource(source="text", paths=(f"{text_folder}/*",)),
        DataSource(source="jsonl", paths=(str(jsonl_file),)),
    )
    config = DataConfig(mixture=mixture, eval_paths=(str(jsonl_file),), text_field="body")
    assert loader._read_eval_paths(config)[0].name == "lines.jsonl:1"


def test_hold_out_of_none_or_all(text_folder, tmp_path):
    only = str(text_folder / "00.txt")
    with pytest.raises(ValueError, match="holds out none of the 1 documents"):
        prepare(text_config(text_folder, paths=(only,), eval_fraction=1e-6), 400)
    with pytest.raises(ValueError, match=f"holds out every document of {only}"):
        prepare(text_config(text_folder, paths=(only,), eval_fraction=1 - 1e-9), 400)
    none = prepare(text_config(text_folder, eval_fraction=0.0), 400)
    assert none.held_out == () and len(none.held_out_rows) == 0


def test_too_little_text_for_a_row(tmp_path, tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("two words")
    config = DataConfig(source="text", paths=(str(path),), eval_fraction=0.0)
    with pytest.raises(ValueError, match=r"short\.txt: \d+ tokens, expected .* = 4097"):
        prepare(config, 400, tokenizer=tokenizer)


def tokens_config(path: Path, **changes) -> DataConfig:
    fields = {"source": "tokens", "paths": (str(path),), "seq_len": SEQ_LEN, "shuffle": False}
    return DataConfig(**{**fields, **changes})


def save_tokens(path: Path, count: int, first: int = 0) -> Path:
    rows = np.arange(first, first + count * (SEQ_LEN + 1), dtype=np.int32)
    np.save(path, rows.reshape(count, SEQ_LEN + 1))
    return path


def test_token_arrays_row_by_row(tmp_path):
    save_tokens(tmp_path / "1.npy", 6)
    save_tokens(tmp_path / "2.npy", 4, first=30)
    data = prepare(tokens_config(tmp_path / "*.npy"), vocab_size=50)
    assert data.tokenizer is None and data.held_out == () and len(data.held_out_rows) == 0
    source = Loader(data, batch_size=2, seed=0)
    for step in range(5):  # row step * batch + j is sequence j of the step
        tokens = source.next_batch().tokens
        assert tokens.dtype == np.int32
        start = step * 2 * (SEQ_LEN + 1)
        np.testing.assert_array_equal(tokens.reshape(-1), np.arange(start, start + 10))


def test_token_arrays_with_eval_paths_mask_and_late_check(tmp_path, tokenizer, monkeypatch):
    save_tokens(tmp_path / "1.npy", 6)
    held = save_tokens(tmp_path / "held.npy", 3, first=5)
    tokenizer.save(tmp_path / "tokenizer.json")
    config = tokens_config(tmp_path / "*.npy", eval_paths=(str(held),), cross_document_mask=True)
    with pytest.raises(ValueError, match="cross_document_mask is True, expected"):
        prepare(config, 400)
    config = dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"fim_rate is 0\.1, expected 0 for token arrays"):
        prepare(dataclasses.replace(config, fim_rate=0.1), 400)
    data = prepare(config, 400)
    assert len(data.rows[0]) == 6 and len(data.held_out_rows) == 3  # held.npy is not trained on
    batch = Loader(data, 2, 0).next_batch()
    assert batch.documents.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]  # token 1 is the eos
    with pytest.raises(ValueError, match=r"1\.npy: row 3, column 1: token 16"):
        prepare(tokens_config(tmp_path / "1.npy"), vocab_size=16)
    monkeypatch.setattr(sources, "CHECKED_AT_ONCE", 0)
    late = Loader(prepare(tokens_config(tmp_path / "1.npy"), vocab_size=16), 2, 0)
    late.next_batch()
    with pytest.raises(ValueError, match=r"1\.npy: row 3, column 1: token 16"):
        late.next_batch()
