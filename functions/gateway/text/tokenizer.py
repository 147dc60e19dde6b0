"""A model's text: its tokenizer, chat template and end tokens, from the files published with it. No torch, no transformers."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Self

import msgspec
from tokenizers import Tokenizer

from eventing.problems import ContextExceeded, InvalidRequest
from eventing.wire.generation import GenerateRequest, Message
from eventing.wire.tools import Tool
from functions.gateway.text.chat_template import ChatTemplate
from functions.gateway.text.control_tokens import ControlTokens
from functions.gateway.text.encoder import Encoder
from functions.gateway.text.grammars import Grammars
from functions.gateway.text.model_tools import ModelTools, described, turn_of
from functions.gateway.text.reasoning import BEGIN, Reasoning, thoughts_apart
from functions.gateway.text.tool_calls import AnswerParts, ToolCallParser
from functions.gateway.text.tool_formats import format_of
from storage.models.model_repository import ModelManifest, Reader, read_file

_log: Final = logging.getLogger(__name__)

_TAIL_TOKENS: Final = 32  # at a prompt's end, searched for an open <think>
_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REPLACEMENT: Final = "\ufffd"
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")  # a byte in SentencePiece's byte fallback


@dataclass(eq=False)
class ModelText:
    """A model's tokenizer, chat template, tool format and end tokens. Thread-safe."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_ids: frozenset[int]
    context_length: int  # tokens
    tool_parser: str = "auto"  # name of a tool format; auto: as the template shows
    parse_control_tokens: bool = False  # text of messages and tools that spells a control token becomes the token

    def __post_init__(self) -> None:
        self.encoder = Encoder(self.tokenizer, self.context_length)
        self.grammars = Grammars(self.tokenizer.to_str, self.eos_ids)
        template = self.template
        format = format_of("" if template is None else template.source, self.tool_parser)
        special = {str(token): id_ for id_, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        self.tools = ModelTools(format, template is not None and "tools" in template.used, special)
        self.control: ControlTokens | None = None  # nothing in messages is guarded
        if template is not None and not self.parse_control_tokens:
            self.control = ControlTokens(self.tokenizer, template)

    @classmethod
    def load(
        cls, reader: Reader, manifest: ModelManifest, tool_parser: str = "auto", parse_control_tokens: bool = False
    ) -> Self:
        """Reads the files that were published with the model.

        `tool_parser` and `parse_control_tokens` become the fields. Raises ObjectNotFound if there is no tokenizer.json,
        ValueError for files that cannot be parsed.
        """
        tokenizer = Tokenizer.from_str(read_file(reader, manifest, "tokenizer.json").decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer_config, generation_config, config = (
            msgspec.json.decode(read_file(reader, manifest, name), type=dict[str, Any]) if name in manifest.files else {}
            for name in ("tokenizer_config.json", "generation_config.json", "config.json")
        )
        special = _special_tokens(tokenizer_config)
        return cls(
            tokenizer,
            _chat_template(reader, manifest, tokenizer_config, special),
            _eos_ids(tokenizer, special, generation_config, config),
            manifest.context_length,
            tool_parser,
            parse_control_tokens,
        )

    def check_messages(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> None:
        """Raises ContextExceeded if a conversation with its tools cannot fit into the context. Looks at lengths only."""
        if len(messages) > self.context_length:
            raise ContextExceeded.by(f"your {len(messages)} messages have at least a token each", self.context_length)
        characters = sum(len(message.content) for message in messages)
        calls = (call for message in messages for call in message.tool_calls)
        characters += sum(len(call.function.name) + len(call.function.arguments) for call in calls)
        characters += len(msgspec.json.encode(tools)) // 4 if tools else 0  # a character has at most four bytes
        self.encoder.check(characters)

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Raises InvalidRequest for a token outside of the vocabulary, ContextExceeded for too many tokens."""
        vocabulary = self.tokenizer.get_vocab_size(with_added_tokens=True)
        if (greatest := max(token_ids, default=0)) >= vocabulary:
            raise InvalidRequest(f"token {greatest} is outside of the vocabulary of {vocabulary}")
        if len(token_ids) > self.context_length:
            raise ContextExceeded.by(f"your prompt has {len(token_ids)} tokens", self.context_length)

    def encode_pair(self, first: str, second: str) -> list[int]:
        """Returns the token ids of two texts that a classifier compares, joined by the tokenizer. Raises ContextExceeded."""
        self.encoder.check(len(first) + len(second))
        ids: list[int] = self.tokenizer.encode(first, second).ids
        return ids

    def encode_messages(
        self,
        messages: Sequence[Message],
        values: Mapping[str, Any] = MappingProxyType({}),
        tools: Sequence[Tool] = (),
        effort: str | None = None,
    ) -> list[int]:
        """Renders a conversation with the chat template and returns its token ids. The template writes special tokens itself.

        `values` and `effort` are as for ChatTemplate.variables. `tools` are those that the model may call. Raises
        InvalidRequest if the model has no template or the template refuses the messages, ContextExceeded if they cannot fit.
        """
        if self.template is None:
            raise InvalidRequest("the model has no chat template; send `prompt` instead of `messages`")
        self.check_messages(messages, tools)
        turns = [turn_of(message) for message in messages]
        functions, values = described(tools), self.template.variables(values, effort)
        control = self.control
        if control is not None and not control.are_in(turns, functions, values):
            control = None
        if control is not None:
            turns = thoughts_apart(turns) if self.template.reasons else turns
            turns, functions, values = control.guard(turns), control.guard(functions), control.guard(values)
        turns, functions = self.tools.presented(turns, functions)
        text = self.template.render(turns, self.encoder.check, values, functions)
        return self.encoder.encode(text, add_special_tokens=False) if control is None else control.encode(text, self.encoder)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of tokens, including that of special tokens. Other threads can run meanwhile."""
        # The library releases the GIL for batches but not for a single list.
        (text,) = self.tokenizer.decode_batch([list(token_ids)], skip_special_tokens=False)
        return text

    def reasoning(self, prompt_ids: Sequence[int]) -> Reasoning | None:
        """Returns a Reasoning for the answer to this rendered prompt. None if the chat template has no mark for thoughts.

        The answer begins with thoughts if the prompt ends with <think>. If <think> is a token, only the token counts, because a
        client may have written the text.
        """
        if self.template is None or not self.template.reasons:
            return None
        tail = prompt_ids[-_TAIL_TOKENS:]
        mark = self.tokenizer.token_to_id(BEGIN)
        if mark is None:
            return Reasoning(inside=self.decode(tail).rstrip().endswith(BEGIN))
        return Reasoning(inside=next((id_ for id_ in reversed(tail) if self.token_text(id_).strip()), None) == mark)

    def parts(self, prompt_ids: Sequence[int], request: GenerateRequest) -> AnswerParts:
        """Returns an AnswerParts that splits the answer to this rendered prompt. An answer with a grammar has no thoughts."""
        reasoning = None if request.constrained else self.reasoning(prompt_ids)
        names = frozenset(tool.function.name for tool in request.callable_tools)
        return AnswerParts(reasoning, ToolCallParser(self.tools.format, names) if names else None)

    def token_text(self, token_id: int) -> str:
        """Returns the token's text, also that of a special token.

        Bytes that are no whole character become the replacement character.
        """
        text: str = self.tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes | None:
        """Returns the token's bytes, which may be a part of a character. None if the vocabulary does not show them."""
        text = self.token_text(token_id)
        if _REPLACEMENT not in text:
            return text.encode()
        name: str = self.tokenizer.id_to_token(token_id) or ""
        if found := _BYTE.fullmatch(name):
            return bytes([int(found[1], 16)])
        try:
            return bytes(_BYTE_OF[character] for character in name)
        except KeyError:
            return None


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the special tokens of tokenizer_config.json: name → text.

    A token in that file is a string, or an object with the string as `content`.
    """
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
    """Returns the model's chat template: chat_template.jinja, else the one in tokenizer_config.json. None if it has none.

    If tokenizer_config.json has several named templates, the one named `default` is used.
    """
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
    """Returns the tokens that end an answer: from generation_config.json, else config.json, else the tokenizer's eos_token."""
    for config in (generation_config, model_config):
        ids = config.get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, Iterable) else [ids])
    eos = tokenizer.token_to_id(special.get("eos_token", ""))
    if eos is None:
        _log.warning("the model names no end-of-text token: answers end at max_tokens")
    return frozenset() if eos is None else frozenset([eos])


def _byte_characters() -> dict[str, int]:
    """Returns the byte of each character in byte-level BPE (GPT-2's `bytes_to_unicode`).

    Printable bytes stand for themselves. The others are the characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF: Final = _byte_characters()
