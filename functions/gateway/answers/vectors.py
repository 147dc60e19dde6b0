"""Makes vectors of texts on the stages: those of one request, a few at a time. Knows no HTTP."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from eventing.problems import ContextExceeded, InvalidRequest, Problem, QueueFull
from eventing.wire.events import Pooling
from functions.gateway.answers.generation import LOOK_SECONDS, ClientLeft
from functions.gateway.answers.metrics import GenAIOperation
from functions.gateway.answers.service import AnswerService, RequestContext
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.text.tokenizer import ModelText

_TEXTS_AT_ONCE: Final = 64  # of one request that wait or are computed; more would take the queue from others
_MOST_TOKENS_IN_ONE_CHUNK: Final = 8192  # a stage computes them in one pass, whose memory grows with them


@dataclass(frozen=True, slots=True)
class Vectors:
    vectors: list[list[float]]  # one for each text, not normalized
    prompt_tokens: int  # of all texts


@dataclass(frozen=True, slots=True)
class VectorService:
    """Makes vectors of texts. Thread-safe."""

    _service: Callable[[], AnswerService]  # raises NotReady before the tokenizer is loaded

    @property
    def classifies(self) -> bool:
        """Whether the model scores pairs of texts: it makes one logit of each pair."""
        embedder = self._service().embedder
        return embedder is not None and embedder.classifies

    @property
    def normalizes(self) -> bool:
        """Whether vectors are scaled to length 1 unless a client asks otherwise."""
        embedder = self._service().embedder
        return embedder is None or embedder.normalized

    def checked_dimensions(self, wanted: int | None, pooling: Pooling | None) -> int | None:
        """Returns how many numbers of each vector to keep, or None for all of them.

        Raises InvalidRequest if the model's vectors cannot be cut to `wanted`, or the model pools in another way than
        `pooling`.
        """
        embedder = self._service().embedder
        if embedder is None:
            if wanted is not None:
                raise InvalidRequest("`dimensions` is for models that were trained for shorter vectors, and this one was not")
            return None
        if embedder.classifies:
            raise InvalidRequest("this model scores pairs of texts and makes no vectors; ask /v1/score or /v1/rerank")
        if pooling not in (None, embedder.pooling):
            raise InvalidRequest(f"`pooling` is {pooling}, and this embedder was trained for {embedder.pooling}; leave it out")
        if wanted is None or wanted == embedder.size:
            return None
        if embedder.dimensions is None and wanted < embedder.size:
            return wanted
        if wanted not in (embedder.dimensions or ()):
            allowed = ", ".join(map(str, embedder.dimensions or ())) or f"none but {embedder.size}"
            raise InvalidRequest(
                f"`dimensions` is {wanted}, and the model's vectors of {embedder.size} numbers can be shortened to: {allowed} "
                "(matryoshka_dimensions or is_matryoshka in its config.json)"
            )
        return wanted

    def checked(self, text: str | Sequence[int] | tuple[str, str], model: ModelText, truncate: int | None) -> Sequence[int]:
        """Returns the token ids of a text or of a pair of texts. Given token ids are only checked.

        `truncate` is the number of tokens to keep. If it is -1, keeps as many as the model takes. If it is None, keeps all.
        Raises ContextExceeded for more tokens than the model takes, InvalidRequest for none or unknown ones.
        """
        embedder = self._service().embedder
        limit = model.context_length
        if embedder is not None:
            limit = min(limit, embedder.max_tokens or limit, _MOST_TOKENS_IN_ONE_CHUNK if embedder.in_one_chunk else limit)
        if isinstance(text, str):
            token_ids: Sequence[int] = model.encoder.encode(text)
        elif text and isinstance(text[0], str):
            token_ids = model.encode_pair(*text)
        else:
            token_ids = text  # type: ignore[assignment]
        if truncate is not None:
            token_ids = token_ids[: limit if truncate == -1 else truncate]
        model.check_ids(token_ids)
        if not token_ids:
            raise InvalidRequest("a text has no tokens")
        if len(token_ids) > limit:
            raise ContextExceeded.by(f"a text has {len(token_ids)} tokens", limit)
        return token_ids

    def make(
        self, encode: Callable[[ModelText], Sequence[Sequence[int]]], context: RequestContext, pooling: Pooling | None
    ) -> Vectors:
        """Returns the vectors of texts, after all have come. `encode` returns the token ids of each text.

        If `pooling` is None, pools as the model is published, or takes the last token. Raises ClientLeft, and the Problem that
        ended one of the texts.
        """
        service = self._service()
        release, tokens = service.limits.admit(context.client_id, in_background=context.in_background), 0
        operation, error = GenAIOperation("embeddings", service.models.model), None
        streams: list[TokenStream] = []
        vectors: list[list[float]] = []
        try:
            with service.scheduler.entering(context.client_id):
                texts = encode(service.text)
            tokens = sum(map(len, texts))
            service.metrics.prompt_tokens.inc(tokens)
            while len(vectors) < len(texts):
                waiting = len(streams) - len(vectors)
                if len(streams) < len(texts) and waiting < _TEXTS_AT_ONCE:
                    try:
                        streams.append(service.submit_text(texts[len(streams)], context, pooling))
                        continue
                    except QueueFull:
                        if not waiting:
                            raise
                vectors.append(_vector(streams[len(vectors)], context.gone))
        except Problem as problem:
            error = problem.name
            raise
        except ClientLeft:
            error = "cancelled"
            raise
        finally:
            for stream in streams[len(vectors) :]:
                stream.cancel()
            release(tokens)
            service.metrics.answers.labels(error or "stop").inc()
            service.metrics.gen_ai.observe(operation, error, time.monotonic() - context.arrived, 0.0, 0)
        return Vectors(vectors, tokens)


def _vector(stream: TokenStream, gone: Callable[[], bool]) -> list[float]:
    """Waits for the vector of one text and returns it. Raises ClientLeft, and the Problem that ended the sequence."""
    while not stream.over:
        stream.next_token(LOOK_SECONDS)
        if gone():
            raise ClientLeft
    stream.next_token()  # raises its problem
    return stream.vector
