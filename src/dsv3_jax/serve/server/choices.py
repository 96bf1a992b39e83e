"""The text of one choice, piece by piece, from the tokens that the engine makes."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_jax.data.tokenizer import StreamDecoder, Tokenizer
from dsv3_jax.serve.request import Output, TokenLogprobs
from dsv3_jax.serve.stops import StopFinder


@dataclass(frozen=True, kw_only=True)
class TokenDetail:
    """A token of an answer with its log-probabilities; `offset` is where its text begins."""

    logprobs: TokenLogprobs
    offset: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What an answer grew by. `finish` is OpenAI's reason, or None while it goes on."""

    text: str
    details: tuple[TokenDetail, ...] = ()
    finish: str | None = None


class Choice:
    """One answer in the making. After a piece with a `finish` nothing more is asked of it."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], stop_tokens: Sequence[int]):
        self._decoder = StreamDecoder(tokenizer)
        self._finder = StopFinder(stop) if stop else None
        self._stop_tokens = stop_tokens
        self._length = 0
        self.tokens = 0
        """Those made, a last stop token counted; none after a stop text."""
        self.finish: str | None = None

    def push(self, output: Output) -> Piece:
        """The piece that the output of a step adds."""
        texts, details = [], []
        for place, token in enumerate(output.tokens):
            self.tokens += 1
            is_last = output.finish == "stop" and place == len(output.tokens) - 1
            if is_last and token in self._stop_tokens:
                break
            if output.logprobs:
                details.append(TokenDetail(logprobs=output.logprobs[place], offset=self._length))
            text = self._decoder.step(token)
            self._length += len(text)
            if self._finder is not None:
                text = self._finder.push(text)
            texts.append(text)
            if self._finder is not None and self._finder.found:
                self.finish = "stop"
                return Piece(text="".join(texts), details=tuple(details), finish="stop")
        if output.finish is not None:
            self.finish = output.finish
            texts.append(self._ending())
            if self._finder is not None and self._finder.found:
                self.finish = "stop"
        return Piece(text="".join(texts), details=tuple(details), finish=self.finish)

    def _ending(self) -> str:
        rest = self._decoder.finish()
        if self._finder is None:
            return rest
        rest = self._finder.push(rest)
        return rest if self._finder.found else rest + self._finder.finish()
