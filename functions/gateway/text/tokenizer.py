"""Text ↔ token ids, by the files that were published with the model. No torch, no transformers."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Self

import msgspec
from tokenizers import Tokenizer

from eventing.problems import ContextExceeded, InvalidRequest
from eventing.wire.generation import Message
from eventing.wire.tools import Tool
from functions.gateway.text.chat_template import ChatTemplate
from functions.gateway.text.encoder import Encoder
from functions.gateway.text.grammars import Grammars
from functions.gateway.text.model_tools import ModelTools, described
from functions.gateway.text.reasoning import Reasoning, within
from functions.gateway.text.token_text import token_bytes, token_text
from functions.gateway.text.tool_formats import format_of
from storage.models.model_repository import ModelManifest, Reader, read_file

_log: Final = logging.getLogger(__name__)

_TAIL_TOKENS: Final = 32
"""In which a prompt says whether the answer begins within thoughts."""
_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class ModelText:
    """What the gateway knows about a model: how its text is read and written, and where answers end. Thread-safe."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_ids: frozenset[int]
    context_length: int
    """Tokens."""
    encoder: Encoder = field(init=False)
    tool_parser: str = "auto"
    """A format of tool calls by name; auto: as the template shows."""
    grammars: Grammars = field(init=False)
    tools: ModelTools = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder", Encoder(self.tokenizer, self.context_length))
        object.__setattr__(self, "grammars", Grammars(self.tokenizer.to_str, self.eos_ids))
        template = self.template
        format = format_of("" if template is None else template.source, self.tool_parser)
        special = {str(token): id_ for id_, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        object.__setattr__(self, "tools", ModelTools(format, template is not None and template.knows("tools"), special))

    @classmethod
    def load(cls, reader: Reader, manifest: ModelManifest, tool_parser: str = "auto") -> Self:
        """Raises ObjectNotFound where there is no tokenizer.json, ValueError for files that cannot be read."""
        tokenizer = Tokenizer.from_str(read_file(reader, manifest, "tokenizer.json").decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        files = {name: _json_file(reader, manifest, name) for name in ("tokenizer_config.json", "generation_config.json")}
        model_config = _json_file(reader, manifest, "config.json")
        special = _special_tokens(files["tokenizer_config.json"])
        return cls(
            tokenizer,
            _chat_template(reader, manifest, files["tokenizer_config.json"], special),
            _eos_ids(tokenizer, special, files["generation_config.json"], model_config),
            manifest.context_length,
            tool_parser,
        )

    def check(self, prompt: str) -> None:
        """Raises InvalidRequest where it is so long that it cannot fit into the context. Looks at its length only."""
        self.encoder.check(len(prompt))

    def check_messages(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> None:
        """The same for a conversation, every message of which takes at least one token, and for what it is told of tools."""
        if len(messages) > self.context_length:
            raise ContextExceeded(
                f"{len(messages)} messages are more than the model's context has tokens, {self.context_length}; send fewer"
            )
        calls = (call for message in messages for call in message.tool_calls)
        told = sum(len(call.function.name) + len(call.function.arguments) for call in calls)
        told += len(msgspec.json.encode(tools)) // 4 if tools else 0  # at most four bytes a character
        self.encoder.check(sum(len(message.content) for message in messages) + told)

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """The same for tokens, which must be of the vocabulary, too."""
        size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        if (greatest := max(token_ids)) >= size:
            raise InvalidRequest(f"token {greatest} is outside of the vocabulary of {size}")
        if len(token_ids) > self.context_length:
            raise ContextExceeded(
                f"the prompt has {len(token_ids)} tokens, the model's context {self.context_length}; shorten it"
            )

    def encode(self, prompt: str) -> list[int]:
        """With the special tokens that the tokenizer itself puts around a text. Raises InvalidRequest where it cannot fit."""
        return self.encoder.encode(prompt, add_special_tokens=True)

    def encode_expected(self, answer: str) -> list[int]:
        """What an answer would be, or a part of one: without special tokens. Raises InvalidRequest where it cannot fit."""
        return self.encoder.encode(answer, add_special_tokens=False)

    def reasoning(self, prompt_ids: Sequence[int]) -> Reasoning | None:
        """For the text of an answer behind messages; None where the model does not think first."""
        if self.template is None or not self.template.reasons:
            return None
        tail = self.tokenizer.decode(list(prompt_ids[-_TAIL_TOKENS:]), skip_special_tokens=False)
        return Reasoning(inside=within(tail))

    def token_text(self, token_id: int) -> str:
        """A special token's name; what is no whole character as the replacement character."""
        return token_text(self.tokenizer, token_id)

    def token_bytes(self, token_id: int) -> bytes | None:
        """None where they cannot be known."""
        return token_bytes(self.tokenizer, token_id)

    def encode_messages(
        self, messages: Sequence[Message], values: Mapping[str, Any] = MappingProxyType({}), tools: Sequence[Tool] = ()
    ) -> list[int]:
        """Through the chat template, which writes special tokens itself. values: its other variables. tools: that may be
        called. Raises InvalidRequest."""
        if self.template is None:
            raise InvalidRequest("the model has no chat template; send `prompt` instead of `messages`")
        self.check_messages(messages, tools)
        turns, told = self.tools.turns(messages, tools), described(tools) if self.tools.told_by_template else []
        text = self.template.render(turns, self.encoder.most_characters, values, told)
        return self.encoder.encode(text, add_special_tokens=False)


def _json_file(reader: Reader, manifest: ModelManifest, name: str) -> dict[str, Any]:
    """Empty where the model was published without it."""
    if name not in manifest.files:
        return {}
    return msgspec.json.decode(read_file(reader, manifest, name), type=dict[str, Any])


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Name → text. A token is a string, or an object with its text as `content`."""
    found = {}
    for name in _SPECIAL_TOKENS:
        token = tokenizer_config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _chat_template(
    reader: Reader, manifest: ModelManifest, tokenizer_config: Mapping[str, Any], special: Mapping[str, str]
) -> ChatTemplate | None:
    """From its own file, else from tokenizer_config.json, where it may be one of several with names."""
    if "chat_template.jinja" in manifest.files:
        source: Any = read_file(reader, manifest, "chat_template.jinja").decode()
    else:
        source = tokenizer_config.get("chat_template")
    if isinstance(source, list):
        source = next((each.get("template") for each in source if each.get("name") == "default"), None)
    return ChatTemplate(source, special) if isinstance(source, str) else None


def _eos_ids(
    tokenizer: Tokenizer, special: Mapping[str, str], generation_config: Mapping[str, Any], model_config: Mapping[str, Any]
) -> frozenset[int]:
    """What ends an answer: as generation_config.json says, else config.json, else the tokenizer's eos_token."""
    for config in (generation_config, model_config):
        ids = config.get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, Iterable) else [ids])
    eos = tokenizer.token_to_id(special.get("eos_token", ""))
    if eos is None:
        _log.warning("the model names no end-of-text token: answers end at max_tokens")
    return frozenset() if eos is None else frozenset([eos])
