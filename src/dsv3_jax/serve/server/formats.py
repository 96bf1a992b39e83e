"""Answers in OpenAI's two shapes, whole and as server-sent events.

Events are put together from texts: at thousands a second a model of each would cost more than the
engine's step.
"""

import json
from collections.abc import Sequence
from typing import Any

from dsv3_jax.serve.server.answers import Answer, Usage
from dsv3_jax.serve.server.choices import Piece, TokenDetail
from dsv3_jax.serve.server.plans import ServedModel

DONE = b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(content)}\n\n".encode()


class Format:
    """What both shapes share. `whole` and `chunk` give finished bytes."""

    stream_object: str
    whole_object: str

    def __init__(self, answer: Answer, served: ServedModel, created: int):
        self._answer = answer
        self._plan = answer.plan
        self._vocabulary = served.vocabulary
        self._common = {"id": answer.name, "created": created, "model": served.name}
        head = json.dumps({**self._common, "object": self.stream_object})[:-1]
        self._head = f'data: {head}, "choices": [{{"index": '
        self._tail = ', "usage": null}\n\n' if answer.plan.include_usage else "}\n\n"

    def openings(self) -> bytes:
        """Events before the first token."""
        raise NotImplementedError

    def chunk(self, index: int, piece: Piece) -> bytes:
        """The event of a piece; nothing for one that adds nothing to see."""
        if not piece.text and not piece.details and piece.finish is None:
            return b""
        finish = "null" if piece.finish is None else f'"{piece.finish}"'
        logprobs = "null"
        if self._plan.sampling.logprobs is not None and piece.details:
            logprobs = json.dumps(self._logprobs(piece.details))
        content = self._delta(piece.text)
        text = f'{index}, {content}, "logprobs": {logprobs}, "finish_reason": {finish}}}]'
        return (self._head + text + self._tail).encode()

    def usage_chunk(self, usage: Usage) -> bytes:
        """The last event where usage is asked for."""
        content = {**self._common, "object": self.stream_object, "choices": []}
        return event({**content, "usage": usage.as_json()})

    def whole(
        self, texts: Sequence[str], details: Sequence[list[TokenDetail]], usage: Usage
    ) -> bytes:
        """The body of an answer that is not streamed."""
        choices = []
        for index, choice in enumerate(self._answer.choices):
            logprobs = None
            if self._plan.sampling.logprobs is not None:
                logprobs = self._logprobs(details[index])
            content = self._content(self._echo(index) + texts[index])
            finish = {"logprobs": logprobs, "finish_reason": choice.finish}
            choices.append({"index": index, **content, **finish})
        common = {**self._common, "object": self.whole_object}
        return json.dumps({**common, "choices": choices, "usage": usage.as_json()}).encode()

    def _echo(self, index: int) -> str:
        return self._plan.echoes[index // self._plan.n] if self._plan.echoes else ""

    def _delta(self, text: str) -> str:
        raise NotImplementedError

    def _content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, details: Sequence[TokenDetail]) -> dict[str, Any]:
        raise NotImplementedError


class CompletionFormat(Format):
    """`text_completion`."""

    stream_object = whole_object = "text_completion"

    def openings(self) -> bytes:
        """The prompts where they are echoed."""
        if not self._plan.echoes:
            return b""
        echoes = range(len(self._answer.choices))
        return b"".join(self.chunk(index, Piece(text=self._echo(index))) for index in echoes)

    def _delta(self, text: str) -> str:
        return f'"text": {json.dumps(text)}'

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, details: Sequence[TokenDetail]) -> dict[str, Any]:
        label = self._vocabulary.label
        top = None
        if self._plan.sampling.logprobs:
            top = [
                {
                    label(token): logprob
                    for token, logprob in (
                        (detail.logprobs.token, detail.logprobs.logprob),
                        *detail.logprobs.top,
                    )
                }
                for detail in details
            ]
        return {
            "tokens": [label(detail.logprobs.token) for detail in details],
            "token_logprobs": [detail.logprobs.logprob for detail in details],
            "top_logprobs": top,
            "text_offset": [detail.offset for detail in details],
        }


class ChatFormat(Format):
    """`chat.completion` and `chat.completion.chunk`."""

    stream_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def openings(self) -> bytes:
        """The role of each choice."""
        delta = '"delta": {"role": "assistant", "content": ""}'
        rest = f'{delta}, "logprobs": null, "finish_reason": null}}]{self._tail}'
        choices = range(len(self._answer.choices))
        return "".join(f"{self._head}{index}, {rest}" for index in choices).encode()

    def _delta(self, text: str) -> str:
        return f'"delta": {{"content": {json.dumps(text)}}}' if text else '"delta": {}'

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, details: Sequence[TokenDetail]) -> dict[str, Any]:
        content = [
            {
                **self._token(detail.logprobs.token, detail.logprobs.logprob),
                "top_logprobs": [self._token(*each) for each in detail.logprobs.top],
            }
            for detail in details
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        utf8 = self._vocabulary.utf8(token)
        return {"token": self._vocabulary.text(token), "logprob": logprob, "bytes": list(utf8)}
