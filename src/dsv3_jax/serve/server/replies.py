"""Bodies of answers, for the published schema alone: `formats` writes them."""

from typing import Literal

from pydantic import BaseModel


class ErrorContent(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's shape of errors."""

    error: ErrorContent


class PromptDetails(BaseModel):
    cached_tokens: int


class UsageReply(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionReply(BaseModel):
    """Of /v1/completions; with `stream`, server-sent events of the same."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageReply


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ContentLogprob]
    refusal: None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatReply(BaseModel):
    """Of /v1/chat/completions; with `stream`, server-sent events of chat.completion.chunk."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageReply


class ModelReply(BaseModel):
    """A served model. `chat_template` is checkpoint, or fallback: "User: ...\\n\\nAssistant:"."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    chat_template: Literal["checkpoint", "fallback"]


class ModelsReply(BaseModel):
    object: Literal["list"]
    data: list[ModelReply]


class TokenizeReply(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeReply(BaseModel):
    prompt: str


class StatusReply(BaseModel):
    status: str


class StatsReply(BaseModel):
    """Gauges of now; latencies are of the last minute, in seconds."""

    model_config = {"extra": "allow"}
    waiting: int
    running: int
    slots: int
    tokens_per_second: float
    ttft_p95: float | None
    tpot_p95: float | None
    acceptance: float | None
    expert_load_max_over_mean: float | None
