"""The form that an answer must have, as clients request it: the fields of vLLM's `structured_outputs`."""

from typing import Annotated, Any

from msgspec import Meta, Struct

from eventing.wire.events import MAX_GRAMMAR_BYTES

GrammarText = Annotated[str, Meta(min_length=1, max_length=MAX_GRAMMAR_BYTES)]
MAX_CHOICES = 4096


class StructuredOutputs(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The form that an answer must have. Exactly one field is given."""

    json: dict[str, Any] | GrammarText | None = None  # a JSON schema, or its text
    json_object: bool | None = None  # any JSON object
    regex: GrammarText | None = None  # matches the whole answer
    # The answer is one of these texts.
    choice: Annotated[tuple[GrammarText, ...], Meta(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: GrammarText | None = None  # in llguidance's Lark, or in llama.cpp's GBNF

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if getattr(self, name)]
        if self.json == {} and "json" not in given:
            given.append("json")
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs wants exactly one of {', '.join(self.__struct_fields__)}, not {given or 'none'}"
            )
