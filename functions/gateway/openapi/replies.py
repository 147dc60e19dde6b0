"""Types of replies, for the OpenAPI document only. Requests are described by the types that check them."""

from datetime import datetime
from typing import Annotated, Literal

from msgspec import Meta, Struct

from eventing.wire.generation import GenerateRequest, GenerateResponse, Usage
from eventing.wire.tools import ToolCall

NotEmpty = Annotated[str, Meta(min_length=1)]
FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


class APIError(Struct, frozen=True):
    message: str  # what was seen, and what to do
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    code: str
    param: str | None = None


class ErrorReply(Struct, frozen=True):
    """An error under /v1, in the shape of the OpenAI API."""

    error: APIError


class ProblemDocument(Struct, frozen=True):
    """An error of a path that is not under /v1 (RFC 9457)."""

    title: str
    status: int
    type: str = "about:blank"
    detail: str | None = None


class ModelCard(Struct, frozen=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Struct, frozen=True):
    object: Literal["list"]
    data: tuple[ModelCard, ...]


class TopLogprob(Struct, frozen=True):
    token: str
    logprob: float | None
    bytes: tuple[int, ...] | None


class ChatTokenLogprob(TopLogprob, frozen=True):
    top_logprobs: tuple[TopLogprob, ...]


class ChatLogprobs(Struct, frozen=True):
    content: tuple[ChatTokenLogprob, ...] | None
    refusal: None = None


class ChatAnswer(Struct, frozen=True):
    role: Literal["assistant"]
    content: str | None  # None beside tool_calls only
    reasoning_content: str | None = None  # if the model's chat template marks thoughts
    tool_calls: tuple[ToolCall, ...] = ()
    refusal: None = None


class ChatChoice(Struct, frozen=True):
    index: int
    message: ChatAnswer
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None


class Completed(Struct, frozen=True, kw_only=True):
    """Fields of every reply to a request for completions, and of every chunk of a stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str  # the pipeline's


class ChatCompletion(Completed, frozen=True, kw_only=True):
    object: Literal["chat.completion"]
    choices: tuple[ChatChoice, ...]
    usage: Usage


class FunctionCallDelta(Struct, frozen=True):
    arguments: str  # more text of them, as JSON
    name: str | None = None  # at the begin of the call only


class ToolCallChunk(Struct, frozen=True):
    index: int  # of the call
    function: FunctionCallDelta
    id: str | None = None  # at the begin of the call only, as is `type`
    type: Literal["function"] | None = None


class ChatDelta(Struct, frozen=True):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCallChunk, ...] = ()


class ChatChunkChoice(Struct, frozen=True):
    index: int
    delta: ChatDelta
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None


class ChatCompletionChunk(Completed, frozen=True, kw_only=True):
    """Data of one server-sent event of a streamed chat completion. The last event's data is `[DONE]`."""

    object: Literal["chat.completion.chunk"]
    choices: tuple[ChatChunkChoice, ...]
    usage: Usage | None = None


class CompletionLogprobs(Struct, frozen=True):
    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[dict[str, float] | None, ...] | None
    text_offset: tuple[int, ...]


class CompletionChoice(Struct, frozen=True):
    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: CompletionLogprobs | None


class Completion(Completed, frozen=True, kw_only=True):
    """A reply of /v1/completions, or the data of one server-sent event of a streamed reply.

    The last event's data is `[DONE]`.
    """

    object: Literal["text_completion"]
    choices: tuple[CompletionChoice, ...]
    usage: Usage | None = None


class OutputPart(Struct, frozen=True):
    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: tuple[()] = ()
    logprobs: tuple[ChatTokenLogprob, ...] = ()


class OutputItem(Struct, frozen=True, kw_only=True):
    """An item of a response: a message, the model's thoughts before it, or a tool call."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    role: Literal["assistant"] | None = None
    content: tuple[OutputPart, ...] = ()
    summary: tuple[()] = ()  # of thoughts
    call_id: str | None = None  # of a function_call, as are the other two
    name: str | None = None
    arguments: str | None = None  # JSON, as the model wrote it


class ResponseUsage(Struct, frozen=True):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens_details: dict[str, int]


class ResponseObject(Struct, frozen=True, kw_only=True):
    """A reply of /v1/responses. Beside these fields it has the options of its request."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete"]
    output: tuple[OutputItem, ...]
    usage: ResponseUsage | None
    incomplete_details: dict[str, str] | None


class ResponseEvent(Struct, frozen=True):
    """Data of one server-sent event of /v1/responses. Further fields depend on `type`."""

    type: str
    sequence_number: int


class VectorUsage(Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


class EmbeddingObject(Struct, frozen=True):
    object: Literal["embedding"]
    index: int
    embedding: tuple[float, ...] | str  # base64 of float32, little endian


class EmbeddingReply(Struct, frozen=True):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: tuple[EmbeddingObject, ...]
    usage: VectorUsage


class ScoreObject(Struct, frozen=True):
    object: Literal["score"]
    index: int
    score: float


class ScoreReply(Struct, frozen=True):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: tuple[ScoreObject, ...]
    usage: VectorUsage


class RankedText(Struct, frozen=True):
    text: str


class RankedDocument(Struct, frozen=True):
    index: int
    relevance_score: float
    document: RankedText | None = None


class RerankReply(Struct, frozen=True):
    id: str
    model: str
    results: tuple[RankedDocument, ...]
    usage: VectorUsage


class Tokens(Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: tuple[int, ...]


class Text(Struct, frozen=True):
    prompt: str


class VersionReply(Struct, frozen=True):
    version: str


class AliveReply(Struct, frozen=True):
    alive: bool


class ReadyReply(Struct, frozen=True):
    ready: bool


class CloudEvent(Struct, frozen=True, kw_only=True):
    """An event in structured mode: attributes and data in one JSON document (CloudEvents 1.0)."""

    specversion: Literal["1.0"]
    id: NotEmpty
    source: NotEmpty
    type: NotEmpty
    datacontenttype: Literal["application/json"] = "application/json"
    time: datetime | None = None
    expirytime: datetime | None = None  # no answer is wanted after it
    traceparent: str | None = None


class GenerateRequestEvent(CloudEvent, frozen=True, kw_only=True):
    type: Literal["dev.lamina.generate.request"]
    data: GenerateRequest


class GenerateResponseEvent(CloudEvent, frozen=True, kw_only=True):
    type: Literal["dev.lamina.generate.response"]
    data: GenerateResponse


class FileForm(Struct, frozen=True):
    """The form that uploads a file. Its field `file` is the content, JSON Lines."""

    file: str
    purpose: Literal["batch"]


class FileReply(Struct, frozen=True):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]
    expires_at: int | None


class FileList(Struct, frozen=True):
    object: Literal["list"]
    data: tuple[FileReply, ...]
    has_more: bool
    first_id: str | None
    last_id: str | None


class FileDeleted(Struct, frozen=True):
    id: str
    object: Literal["file"]
    deleted: bool


class BatchCounts(Struct, frozen=True):
    total: int
    completed: int
    failed: int


class BatchReply(Struct, frozen=True):
    id: str
    object: Literal["batch"]
    endpoint: str
    errors: None
    input_file_id: str
    completion_window: str
    status: Literal["in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: ResponseUsage
    metadata: dict[str, str] | None


class BatchList(Struct, frozen=True):
    object: Literal["list"]
    data: tuple[BatchReply, ...]
    has_more: bool
    first_id: str | None
    last_id: str | None
