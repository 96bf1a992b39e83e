"""Bodies of requests: every field of OpenAI's is honoured, harmless, or refused by its name.

Beyond OpenAI's there are vLLM's `top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and
`stop_token_ids`. Accepted without effect: `user`, `metadata`, `safety_identifier`,
`prompt_cache_key`, and the values of other fields that ask for nothing (`store=false`,
`service_tier=auto`, `tool_choice=none`, `modalities=["text"]`, ...). Any other value of those, and
any field that is not here, is a 400 that names it.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
)
from pydantic import ValidationError as PydanticError
from pydantic_core import PydanticCustomError, from_json

from dsv3_jax.serve.request import MAX_LOGPROBS
from dsv3_jax.serve.server.errors import invalid

MAX_CHOICES = 128
"""Choices of one request, over all its prompts."""
TOKEN_ID = "TokenId"
"""The title of tokens in the schema, where the vocabulary bounds them."""


def _refuse(value: Any) -> None:
    if value is not None and value != []:
        raise PydanticCustomError("unsupported", "is not supported by this server")


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _no(value: bool) -> bool:
    if value:
        raise PydanticCustomError("unsupported", "true is not supported by this server")
    return value


WHOLE = BeforeValidator(_whole)
"""Of integers: 3.0 is one too for JSON Schema."""
No = Annotated[bool, AfterValidator(_no), Field(json_schema_extra={"const": False})]
Refused = Annotated[None, BeforeValidator(_refuse)]
"""A field that this server knows and cannot honour."""
Text = Annotated[str, StringConstraints(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, title=TOKEN_ID), WHOLE]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = dict[
    Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")],
    Annotated[float, Field(ge=-100, le=100)],
]


class Body(BaseModel):
    """JSON taken at its word: no other types, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: No | None = None


class GenerationBody(Body):
    """What completions and chat share."""

    model: str | None = Field(None, description="The served model's id.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE] | None = Field(
        None, description="Choice i uses seed + i; without one it is random."
    )
    max_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0 is greedy; 1 if absent."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31), WHOLE] | None = Field(
        None, description="0 or -1 keeps all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Annotated[Bias, Field(max_length=300)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=4)] | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: No | None = None
    service_tier: Literal["auto", "default"] | None = None


class CompletionBody(GenerationBody):
    """Body of /v1/completions."""

    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_CHOICES),
        ]
    )
    suffix: str | None = Field(None, description="Fills the middle, if the tokenizer can.")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    best_of: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    tool_calls: Refused = None
    tool_call_id: Refused = None
    function_call: Refused = None
    audio: Refused = None
    refusal: Refused = None

    def text(self) -> str:
        """The content, its parts put together."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class JsonSchema(Body):
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormatText(Body):
    type: Literal["text"]


class ResponseFormatObject(Body):
    type: Literal["json_object"]


class ResponseFormatSchema(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatBody(GenerationBody):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    response_format: (
        Annotated[
            ResponseFormatText | ResponseFormatObject | ResponseFormatSchema,
            Field(discriminator="type"),
        ]
        | None
    ) = None
    tools: Refused = None
    functions: Refused = None
    tool_choice: Literal["none"] | None = None
    function_call: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    audio: Refused = None
    prediction: Refused = None
    moderation: Refused = None
    prompt_cache_options: Refused = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    web_search_options: Refused = None


class TokenizeBody(Body):
    """Body of /tokenize: a text, or the messages of a chat as its template puts them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = Field(True, description="Begin a prompt with bos if the model does.")


class DetokenizeBody(Body):
    """Body of /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


def parse[AnyBody: BaseModel](kind: type[AnyBody], content: bytes) -> AnyBody:
    """The body as `kind`. Raises ApiError, a 400 that names the field."""
    try:
        return kind.model_validate_json(content)
    except PydanticError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
    first = found[0]
    if first["type"] == "json_invalid":
        raise invalid(f"The body is no JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if first["loc"] == ():
        raise invalid("The body has to be a JSON object.")
    body = from_json(content)
    param = _path(first["loc"], body)
    if first["type"] == "extra_forbidden":
        raise invalid(f"{param}: this server has no such field", param)
    same = [each["msg"] for each in found if _path(each["loc"], body) == param]  # of a union
    code = "unsupported_parameter" if first["type"] == "unsupported" else None
    raise invalid(f"{param}: {'; or '.join(dict.fromkeys(same))}", param, code)


def _path(places: Sequence[int | str], value: Any) -> str:
    """`messages.0.content`: the places that are in the body, of which names of types are not."""
    kept = []
    for number, place in enumerate(places):
        is_last = number == len(places) - 1
        if isinstance(value, dict) and (place in value or is_last):  # the last may be missing
            value = value.get(place)
        elif isinstance(value, list) and isinstance(place, int):
            value = value[place]
        else:
            continue
        kept.append(str(place))
    return ".".join(kept)
