"""A client's text that spells a control token, such as `<|im_end|>`, reaches the model as text and never as that token.

Otherwise the text of a message could end the message and open a system turn. Only the chat template writes control tokens.
"""

import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise, product
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, models, normalizers

from functions.gateway.text.chat_template import GUARD, ChatTemplate, with_guards
from functions.gateway.text.encoder import Encoder

_ROLES: Final = ("system", "user", "assistant", "tool")  # some templates make tokens of them: '<|' + message.role + '|>'
_TEMPLATE_KEYS: Final = frozenset(  # by which templates read messages and tools
    ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "id", "type", "function", "arguments")
)

_HTML: Final = re.compile(
    "table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|[abipsu]|sub|sup|code|pre|br|hr|ul|ol|li"
)


class ControlTokens:
    """Finds control tokens in what the chat template gets from a client, and encodes them as text. Thread-safe.

    `guard` puts a noncharacter between the characters of such texts, so that the tokenizer does not find the tokens in the
    rendered text. The tokenizer removes the noncharacter only after that. A client's own U+FDD0 in a guarded request is
    removed, too.

    Control tokens are the special ones among the tokenizer's added tokens, and those in brackets, such as `<tool_call>`. Other
    added tokens are ordinary text, such as runs of spaces, and Gemma's tokens for tags of HTML.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self._ids = {token.content: id_ for id_, token in added.items() if _is_control(token)}
        self._control_ids = frozenset(self._ids.values())
        control = [added[id_] for id_ in self._ids.values()]
        # What the template writes before and after a client's text, if it can be a part of a control token.
        begins = {text[:end] for text in self._ids for end in range(1, len(text))}
        ends = {text[start:] for text in self._ids for start in range(1, len(text))}
        longest = max(map(len, self._ids), default=0)
        before = {"", *(text[-size:] for text in template.texts for size in range(1, longest) if text[-size:] in begins)}
        after = {"", *(text[:size] for text in template.texts for size in range(1, longest) if text[:size] in ends)}
        self._around = list(product(before, after))
        self._tokenizer = tokenizer
        self._finder = Tokenizer(models.WordLevel({"text": 0}, unk_token="text"))  # all but control tokens has the id 0
        if tokenizer.normalizer is not None and any(token.normalized for token in control):
            self._finder.normalizer = tokenizer.normalizer
        self._finder.add_tokens([_copy(token, normalized=token.normalized, strips=False) for token in control])
        self._tokenizers: dict[bool, Tokenizer] = {}  # made when a client first spells a control token
        self._lock = threading.Lock()

    def are_in(self, *values: Any) -> bool:
        """Returns whether a string in these values spells a control token, alone or with what the template may write around it.

        `values` are strings, or lists and dicts of them.
        """
        texts = {text.strip() for text in _strings(values)}
        probe = GUARD.join(before + text + after for before, after in self._around for text in texts)
        (encoding,) = self._finder.encode_batch_fast([probe], add_special_tokens=False)
        return any(encoding.ids)

    def guard(self, value: Any) -> Any:
        """Returns the value with the control tokens in its strings guarded.

        Roles, and the keys by which templates read messages and tools, are not changed.
        """
        if isinstance(value, str):
            return self._guard_text(value)
        if isinstance(value, Mapping):
            return _GuardedDict(
                (key if key in _TEMPLATE_KEYS else self.guard(key), each if _is_role(key, each) else self.guard(each))
                for key, each in value.items()
            )
        return _GuardedList(map(self.guard, value)) if isinstance(value, list | tuple) else value

    def encode(self, text: str, encoder: Encoder) -> list[int]:
        """Returns the token ids of text that was rendered from guarded values. Raises ContextExceeded."""
        ids = encoder.encode(text, add_special_tokens=False, tokenizer=self._guarding(splitting=False))
        if Counter(filter(self._control_ids.__contains__, ids)) == self._written(text):
            return ids
        # The vocabulary has a control token's text as an ordinary piece, too. So the text is taken apart at each guard.
        splitting = self._guarding(splitting=True)
        guard_id = splitting.token_to_id(GUARD)
        return [id_ for id_ in encoder.encode(text, add_special_tokens=False, tokenizer=splitting) if id_ != guard_id]

    def _guard_text(self, text: str) -> str:
        core = text.strip()
        places: set[int] = set()  # in `core`, of guards
        for before, after in self._around:
            (encoding,) = self._finder.encode_batch([before + core + after], add_special_tokens=False)  # releases the GIL
            for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if id_:
                    places |= {min(max(place - len(before), 0), len(core)) for place in range(start + 1, end + 1)}
        bounds = [0, *sorted(places), len(core)]
        guarded = GUARD.join(core[start:end] for start, end in pairwise(bounds)) if places else core
        lead = len(text) - len(text.lstrip())
        return text[:lead] + guarded + text[lead + len(core) :]

    def _written(self, text: str) -> Counter[int]:
        """Returns how often each control token occurs in guarded text, by id."""
        (encoding,) = self._finder.encode_batch_fast([text], add_special_tokens=False)
        names = self._finder.get_added_tokens_decoder()
        return Counter(self._ids[names[id_].content] for id_ in encoding.ids if id_)

    def _guarding(self, *, splitting: bool) -> Tokenizer:
        """Returns a tokenizer for guarded text, which shares the model's vocabulary.

        It looks for control tokens before it normalizes, so that guards still keep them apart. Then it removes the guards. If
        `splitting`, it instead encodes the pieces between guards one by one, and makes a token of each guard.
        """
        with self._lock:
            if splitting not in self._tokenizers:
                original = self._tokenizer
                made = Tokenizer(original.model)
                normalizer = [] if original.normalizer is None else [original.normalizer]
                made.normalizer = normalizers.Sequence([normalizers.Replace(GUARD, ""), *normalizer])
                if original.pre_tokenizer is not None:
                    made.pre_tokenizer = original.pre_tokenizer
                added = [token for _, token in sorted(original.get_added_tokens_decoder().items())]  # so they get their ids
                copies = [_copy(each, normalized=each.normalized and each.content not in self._ids) for each in added]
                made.add_tokens([*copies, AddedToken(GUARD, normalized=False)] if splitting else copies)
                self._tokenizers[splitting] = made
            return self._tokenizers[splitting]


class _Guarded:
    """Base of dicts and lists whose repr keeps guards, for templates that write values as Python does."""

    def __repr__(self) -> str:
        return with_guards(super().__repr__())


class _GuardedDict(_Guarded, dict[Any, Any]):
    pass


class _GuardedList(_Guarded, list[Any]):
    pass


def _is_control(token: AddedToken) -> bool:
    text = token.content
    in_brackets = text[:1] + text[-1:] in ("<>", "[]") and not _HTML.fullmatch(text.strip("</>"))
    return bool(text.strip()) and (token.special or in_brackets)


def _copy(token: AddedToken, *, normalized: bool, strips: bool = True) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=strips and token.lstrip,
        rstrip=strips and token.rstrip,
        normalized=normalized,
        special=token.special,
    )


def _is_role(key: Any, value: Any) -> bool:
    return key == "role" and isinstance(value, str) and value in _ROLES


def _strings(value: Any) -> Iterator[str]:
    """Yields all strings that `guard` would guard within a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if key not in _TEMPLATE_KEYS:
                yield from _strings(key)
            if not _is_role(key, each):
                yield from _strings(each)
    elif isinstance(value, Iterable):
        for each in value:
            yield from _strings(each)
