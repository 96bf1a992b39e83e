"""Keys: made by the command, read from the file, found by their secret alone."""

import hashlib
import json

import pytest

from dsv3_jax.serve.server import keys


def test_the_command_makes_a_key_that_is_found_and_kept_nowhere(tmp_path, capsys):
    file = tmp_path / "keys.jsonl"
    assert keys.main(["ann", "--file", str(file), "--requests-per-minute", "60"]) == 0
    assert keys.main(["bob", "--file", str(file)]) == 0
    ann, bob = capsys.readouterr().out.split()
    assert ann.startswith("dsv3-") and ann != bob and len(ann) >= 48
    assert ann not in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    first = json.loads(file.read_text().splitlines()[0])
    digest = hashlib.sha256(ann.encode()).hexdigest()
    assert first == {"name": "ann", "sha256": digest, "requests_per_minute": 60}
    known = keys.read_keys(file)
    assert keys.find_key(known, ann).name == "ann"
    assert keys.find_key(known, bob).requests_per_minute is None
    for wrong in ("", ann[:-1], ann + "x", digest, "\ud800"):
        assert keys.find_key(known, wrong) is None


def test_a_name_is_made_once(tmp_path, capsys):
    file = tmp_path / "keys.jsonl"
    keys.main(["ann", "--file", str(file)])
    for arguments in (["ann"], ["a b"], ["eve", "--tokens-per-minute", "0"]):
        with pytest.raises(SystemExit) as caught:
            keys.main([*arguments, "--file", str(file)])
        assert caught.value.code == 2
    assert len(keys.read_keys(file)) == 1
    assert "name is 'ann', expected one that" in capsys.readouterr().err


GOOD = {"name": "ann", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[]", "found a list, expected an object"),
        ("{", "Expecting property name"),
        (json.dumps({"name": "ann"}), "sha256 is None"),
        (json.dumps({**GOOD, "sha256": "x"}), "sha256 is 'x', expected 64 hexadecimal digits"),
        (json.dumps({**GOOD, "requests_per_minute": 0}), "requests_per_minute is 0"),
        (json.dumps({**GOOD, "tokens_per_minute": True}), "tokens_per_minute is True"),
        (json.dumps({**GOOD, "colour": 1}), "field is 'colour', expected one of name"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, says):
    file = tmp_path / "keys.jsonl"
    file.write_text(json.dumps({**GOOD, "name": "bob"}) + "\n\n" + line + "\n")
    with pytest.raises(ValueError) as caught:
        keys.read_keys(file)
    assert str(caught.value).startswith(f"{file}, line 3: ") and says in str(caught.value)


def test_a_file_without_keys_or_with_one_twice_is_refused(tmp_path):
    file = tmp_path / "keys.jsonl"
    with pytest.raises(ValueError, match="expected a file of API keys"):
        keys.read_keys(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="expected at least one key"):
        keys.read_keys(file)
    file.write_text((json.dumps(GOOD) + "\n") * 2)
    with pytest.raises(ValueError, match="name is 'ann', expected each name once"):
        keys.read_keys(file)
