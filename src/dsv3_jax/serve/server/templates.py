"""A chat as the tokens of a prompt, by the checkpoint's own Jinja template.

The template runs as in Hugging Face's `apply_chat_template`: sandboxed, with `trim_blocks` and
`lstrip_blocks`, `raise_exception`, `strftime_now`, loop controls, `{% generation %}`, and `tojson`
without HTML's escapes.

What the template spells of the tokenizer's added tokens become those tokens; what a user spells of
them stays text. So each beginning of such a name in a message is marked before rendering, and the
text is cut at names and marks after it. The mark is random, so no message holds it.
"""

import datetime
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3_jax.data.tokenizer import Tokenizer

FILE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
FALLBACK = """\
{%- for message in messages -%}
{{ message.role | capitalize }}: {{ message.content | trim }}

{% endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}"""
"""For checkpoints without a template, such as the demo's: "User: Hi\\n\\nAssistant:"."""
FALLBACK_STOP = ("\nUser:", "\nSystem:")
"""What begins the next turn in it, which a model would write itself."""


class ChatTemplate:
    """Messages to tokens. Raises ValueError for a template that is no Jinja."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        special: Mapping[str, str] | None = None,
        stop: tuple[str, ...] = (),
        is_fallback: bool = False,
    ):
        self.stop = stop
        self.is_fallback = is_fallback
        self._tokenizer = tokenizer
        self._special = dict(special or {})
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ValueError(f"chat_template is no Jinja template: {error}") from error
        added = tokenizer.backend.get_added_tokens_decoder()
        self._ids = {token.content: index for index, token in added.items()}
        names = sorted(self._ids, key=len, reverse=True)
        self._names = "|".join(re.escape(name) for name in names) or r"(?!)"
        self._firsts = re.compile("|".join({re.escape(name[0]) for name in names}) or r"(?!)")
        self._sizes = sorted({len(name) for name in names})
        self._heads = {name[:n] for name in names for n in range(1, len(name))}
        self._tails = {name[n:] for name in names for n in range(1, len(name))}

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of the prompt for the next turn.

        Raises ValueError with the template's reason where it refuses the messages.
        """
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        marked = [
            {**message, "content": self._marked(message["content"], mark)} for message in messages
        ]
        rendered = self._render(marked)
        tokens = self._tokenizer.encode_prompt("") if self.is_fallback else []
        for piece in re.split(f"({self._names}|{mark})", rendered):
            if piece in self._ids:
                tokens.append(self._ids[piece])
            elif piece != mark and piece:
                tokens += self._tokenizer.encode(piece)
        return tokens

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special,
            )
        except (TemplateError, TypeError, ArithmeticError, LookupError, ValueError) as error:
            raise ValueError(f"messages do not fit the chat template: {error}") from error

    def _marked(self, text: str, mark: str) -> str:
        """`text` in which no name of a token is whole, nor completed by what stands beside it."""

        def begins_name(match: re.Match[str]) -> str:
            at, left = match.start(), len(text) - match.start()
            is_whole = any(text[at : at + size] in self._ids for size in self._sizes)
            is_cut = left < self._sizes[-1] and text[at:] in self._heads
            return match.group() + (mark if is_whole or is_cut else "")

        longest = max(self._sizes, default=0)
        ends_name = any(text[:size] in self._tails for size in range(1, longest))
        return (mark if ends_name else "") + self._firsts.sub(begins_name, text)


def load_template(directory: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a checkpoint's directory, else `FALLBACK`.

    It is in chat_template.jinja or in tokenizer_config.json (`chat_template`, a text or a list of
    named ones, of which `default` is meant). Raises ValueError for one that is damaged.
    """
    config = {}
    if (directory / CONFIG).is_file():
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    special = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token") and isinstance(value, str | dict)
    }
    for role, index in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if index is not None:
            special.setdefault(f"{role}_token", tokenizer.backend.id_to_token(index))
    source = config.get("chat_template")
    if (directory / FILE).is_file():
        source = (directory / FILE).read_text(encoding="utf-8")
    if isinstance(source, list):
        source = {each.get("name"): each.get("template") for each in source}.get("default")
    if source is None:
        return ChatTemplate(FALLBACK, tokenizer, special, FALLBACK_STOP, is_fallback=True)
    if not isinstance(source, str):
        kind = type(source).__name__
        raise ValueError(f"{directory / CONFIG}: chat_template is a {kind}, expected a text")
    return ChatTemplate(source, tokenizer, special)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, a mark for training: here its content alone."""

    tags = {"generation"}  # noqa: RUF012 - so is Jinja's own

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **rest: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **rest)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
