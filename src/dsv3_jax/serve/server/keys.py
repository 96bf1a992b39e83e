"""API keys: a file of their hashes, and `python -m dsv3_jax.serve.server.keys NAME` to make one.

One JSON object a line: {"name", "sha256"} and, where there is a budget, "requests_per_minute" and
"tokens_per_minute" (of prompts and answers). Keys are 256 random bits, which nobody can find by
trying, so that a fast hash is safe for them; passwords of people would need a slow one.
"""

import argparse
import hashlib
import hmac
import json
import os
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3_jax.config.checks import require

PREFIX = "dsv3-"
DEFAULT_FILE = "api_keys.jsonl"
TEXTS = ("name", "sha256")
"""Fields that each line has."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One line of the file; None is no limit. Raises ValueError for what a line cannot be."""

    name: str
    sha256: str
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None

    def __post_init__(self):
        require(bool(re.fullmatch(r"\S{1,64}", self.name)), "name", self.name, "up to 64 signs")
        is_hash = re.fullmatch(r"[0-9a-f]{64}", self.sha256)
        require(bool(is_hash), "sha256", self.sha256, "64 hexadecimal digits")
        for field in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, field)
            require(value is None or value >= 1, field, value, "null or a number of at least 1")


def make_key(
    name: str,
    requests_per_minute: float | None = None,
    tokens_per_minute: float | None = None,
) -> tuple[str, Key]:
    """A new secret, and what the file has of it."""
    secret = PREFIX + secrets.token_urlsafe(32)
    return secret, Key(
        name=name,
        sha256=_hash(secret),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
    )


def read_keys(path: Path) -> list[Key]:
    """The keys of a file. Raises ValueError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}, expected a file of API keys") from error
    keys: list[Key] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            keys.append(_read_line(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    names = [key.name for key in keys]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"{path}: name", twice, "each name once")
    require(len(keys) > 0, str(path), "empty", "at least one key (dsv3_jax.serve.server.keys)")
    return keys


def find_key(keys: Sequence[Key], secret: str) -> Key | None:
    """The key that `secret` is, in a time that does not tell how much of it was right."""
    digest, found = _hash(secret), None
    for key in keys:
        if hmac.compare_digest(digest, key.sha256):
            found = key
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes a key: appends its hash to the file, prints the secret, which is kept nowhere."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_jax.serve.server.keys")
    parser.add_argument("name", help="whose key it is, for logs")
    parser.add_argument(
        "--file", type=Path, default=Path(DEFAULT_FILE), help="(default %(default)s)"
    )
    parser.add_argument("--requests-per-minute", type=float, metavar="N", help="(default: any)")
    parser.add_argument("--tokens-per-minute", type=float, metavar="N", help="(default: any)")
    options = parser.parse_args(arguments)
    try:
        secret, key = make_key(options.name, options.requests_per_minute, options.tokens_per_minute)
        existing = read_keys(options.file) if options.file.exists() else []
        is_new = key.name not in [each.name for each in existing]
        require(is_new, "name", key.name, f"one that {options.file} has not")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    line = {field: value for field, value in vars(key).items() if value is not None}
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with open(os.open(options.file, flags, 0o600), "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(secret)
    return 0


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _read_line(content: object) -> Key:
    if not isinstance(content, dict):
        raise ValueError(f"found a {type(content).__name__}, expected an object")
    known: dict[str, type | tuple[type, ...]] = dict.fromkeys(TEXTS, str)
    known |= dict.fromkeys(("requests_per_minute", "tokens_per_minute"), (int, float, type(None)))
    for field, value in content.items():
        require(field in known, "field", field, "one of " + ", ".join(known))
        is_right = isinstance(value, known[field]) and not isinstance(value, bool)
        require(is_right, field, value, "a text" if known[field] is str else "a number or null")
    for field in TEXTS:
        require(field in content, field, None, "a text")
    floats = {k: float(v) for k, v in content.items() if k not in TEXTS and v is not None}
    return Key(name=content["name"], sha256=content["sha256"], **floats)


if __name__ == "__main__":
    sys.exit(main())
