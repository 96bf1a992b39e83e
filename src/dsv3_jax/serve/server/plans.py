"""What a body asks of the engine: prompts as tokens, how to choose, when to stop."""

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.serve.request import Request, SamplingParams
from dsv3_jax.serve.server.errors import invalid, named_field
from dsv3_jax.serve.server.grammar import GrammarConstraint, Grammars
from dsv3_jax.serve.server.schemas import (
    MAX_CHOICES,
    ChatBody,
    CompletionBody,
    GenerationBody,
    ResponseFormatObject,
    ResponseFormatSchema,
    TokenizeBody,
)
from dsv3_jax.serve.server.templates import ChatTemplate
from dsv3_jax.serve.server.vocabulary import Vocabulary

COMPLETION_TOKENS = 16
"""`max_tokens` of a completion that does not say, as OpenAI has it; a chat takes what is left."""


class ServedModel:
    """The model as the server knows it: its name, its texts, and how much it takes."""

    def __init__(
        self,
        *,
        name: str,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        vocab_size: int,
        max_seq_len: int,
        stop_tokens: tuple[int, ...],
        created: int,
    ):
        self.name = name
        self.tokenizer = tokenizer
        self.template = template
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        self.stop_tokens = stop_tokens
        self.created = created
        self.vocabulary = Vocabulary(tokenizer)
        self.grammars = Grammars(tokenizer, vocab_size, stop_tokens)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The requests of one body. Choice p·n + i is the i-th of prompt p, with seed + that number."""

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: tuple[int, ...]
    """Of each prompt."""
    n: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    stop_tokens: tuple[int, ...]
    constraint: Callable[[], GrammarConstraint] | None
    stream: bool
    include_usage: bool
    echoes: tuple[str, ...] = ()
    """Texts that the choices of each prompt begin with."""

    @property
    def choices(self) -> int:
        """Of all prompts."""
        return len(self.prompts) * self.n

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counted once, though it has `n` choices."""
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def most_tokens(self) -> int:
        """That the answers may have together."""
        return sum(self.max_tokens) * self.n

    def requests(self, name: str) -> list[Request]:
        """For the engine, one a choice, `name-0` and so on."""
        made = []
        for index in range(self.choices):
            prompt = index // self.n
            seed = (self.sampling.seed + index) % 2**32
            made.append(
                Request(
                    id=f"{name}-{index}",
                    prompt=self.prompts[prompt],
                    max_tokens=self.max_tokens[prompt],
                    sampling=dataclasses.replace(self.sampling, seed=seed),
                    stop_tokens=self.stop_tokens,
                    constraint=self.constraint() if self.constraint else None,
                )
            )
        return made


def plan_completion(body: CompletionBody, served: ServedModel) -> Plan:
    """Raises ApiError for what this model cannot do."""
    prompts = _prompts(body, served)
    if len(prompts) * (body.n or 1) > MAX_CHOICES:
        raise invalid(f"n: {len(prompts)} prompts have more than {MAX_CHOICES} choices", "n")
    if body.echo and body.logprobs is not None:
        raise invalid("logprobs: not supported together with echo", "logprobs")
    echoes = ()
    if body.echo:
        echoes = tuple(
            prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt)
            for prompt in _listed(body)
        )
    max_tokens = [
        _max_tokens(body.max_tokens, COMPLETION_TOKENS, len(prompt), served, "prompt")
        for prompt in prompts
    ]
    return _plan(
        body, served, prompts, max_tokens, logprobs=body.logprobs, stop=_stop(body), echoes=echoes
    )


def plan_chat(body: ChatBody, served: ServedModel) -> Plan:
    """Raises ApiError for what this model cannot do."""
    prompt = encode_chat(body, served)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs: expected logprobs to be true too", "top_logprobs")
    asked = body.max_completion_tokens or body.max_tokens
    if body.max_completion_tokens and body.max_tokens:
        raise invalid("max_tokens: expected max_completion_tokens alone", "max_tokens")
    max_tokens = _max_tokens(asked, served.max_seq_len, len(prompt), served, "messages")
    wanted = body.response_format
    schema = None
    if isinstance(wanted, ResponseFormatObject):
        schema = {"type": "object"}
    if isinstance(wanted, ResponseFormatSchema):
        schema = wanted.json_schema.schema_
    constraint = None
    if schema is not None and body.ignore_eos:
        raise invalid("ignore_eos: expected false with a response_format", "ignore_eos")
    if schema is not None:
        served.grammars.constraint(schema)  # what is wrong with it is said now
        constraint = lambda: served.grammars.constraint(schema)  # noqa: E731
    return _plan(
        body,
        served,
        [prompt],
        [max_tokens],
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        stop=_stop(body) + (served.template.stop if schema is None else ()),
        constraint=constraint,
    )


def encode_chat(body: ChatBody | TokenizeBody, served: ServedModel) -> tuple[int, ...]:
    """The chat's prompt. Raises ApiError where the template refuses the messages."""
    messages = []
    for message in body.messages or ():
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": message.text()})
        if message.name is not None:
            messages[-1]["name"] = message.name
    try:
        tokens = served.template.encode(messages)
    except ValueError as error:
        raise invalid(str(error), "messages") from error
    if not tokens:
        raise invalid("messages: they are no token in the chat template", "messages")
    return tuple(tokens)


def check_model(name: str | None, served: ServedModel) -> None:
    """Raises ApiError, a 404, for another model's name."""
    if name is not None and name != served.name:
        error = invalid(f"The model {name!r} does not exist.", "model", "model_not_found")
        error.status = 404
        raise error


def _plan(
    body: GenerationBody,
    served: ServedModel,
    prompts: Sequence[tuple[int, ...]],
    max_tokens: Sequence[int],
    *,
    logprobs: int | None,
    stop: tuple[str, ...],
    constraint: Callable[[], GrammarConstraint] | None = None,
    echoes: tuple[str, ...] = (),
) -> Plan:
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options: expected stream to be true too", "stream_options")
    _check_tokens("stop_token_ids", body.stop_token_ids or (), served)
    ends = () if body.ignore_eos else served.stop_tokens
    return Plan(
        prompts=tuple(prompts),
        max_tokens=tuple(max_tokens),
        n=body.n or 1,
        sampling=_sampling(body, served, logprobs),
        stop=stop,
        stop_tokens=(*ends, *(body.stop_token_ids or ())),
        constraint=constraint,
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        echoes=echoes,
    )


def _check_tokens(param: str, tokens: Sequence[int], served: ServedModel) -> None:
    wrong = next((token for token in tokens if token >= served.vocab_size), None)
    if wrong is not None:
        raise invalid(f"{param}: {wrong} is no token, expected 0 to {served.vocab_size - 1}", param)


def _sampling(body: GenerationBody, served: ServedModel, logprobs: int | None) -> SamplingParams:
    bias = tuple((int(token), value) for token, value in (body.logit_bias or {}).items())
    _check_tokens("logit_bias", [token for token, _ in bias], served)
    given = {
        name: getattr(body, name)
        for name in ("top_p", "min_p", "presence_penalty", "frequency_penalty")
        if getattr(body, name) is not None
    }
    if body.repetition_penalty is not None:
        given["repetition_penalty"] = body.repetition_penalty
    try:
        return SamplingParams(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=max(body.top_k or 0, 0),
            logit_bias=bias,
            logprobs=logprobs,
            seed=secrets.randbits(32) if body.seed is None else body.seed % 2**32,
            **given,
        )
    except ValueError as error:
        raise invalid(str(error), named_field(error)) from error


def _stop(body: GenerationBody) -> tuple[str, ...]:
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def _listed(body: CompletionBody) -> list[str] | list[list[int]]:
    """The prompts, of which there may be one alone."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    return [prompt] if isinstance(prompt[0], int) else prompt  # pyright: ignore[reportReturnType]


def _prompts(body: CompletionBody, served: ServedModel) -> list[tuple[int, ...]]:
    tokenizer, made = served.tokenizer, []
    for prompt in _listed(body):
        if body.suffix is not None:
            marks = (tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id)
            if None in marks or not isinstance(prompt, str):
                reason = "expected a text and a tokenizer with tokens for filling the middle"
                raise invalid(f"suffix: {reason}", "suffix")
            begin, hole, end = marks
            before, after = tokenizer.encode(prompt), tokenizer.encode(body.suffix)
            tokens = (begin, *before, hole, *after, end)
        elif isinstance(prompt, str):
            tokens = tuple(tokenizer.encode_prompt(prompt))
        else:
            tokens = tuple(prompt)
            _check_tokens("prompt", tokens, served)
        if not tokens:
            raise invalid("prompt: expected text of at least one token", "prompt")
        made.append(tokens)
    return made


def _max_tokens(
    asked: int | None, default: int, prompt_tokens: int, served: ServedModel, param: str
) -> int:
    left = served.max_seq_len - prompt_tokens
    if left < (asked or 1):
        message = (
            f"This model's maximum context length is {served.max_seq_len} tokens. However, you"
            f" requested {prompt_tokens + (asked or 1)} ({prompt_tokens} in the {param},"
            f" {asked or 1} for the answer)."
        )
        raise invalid(message, param, "context_length_exceeded")
    return asked or min(default, left)
