"""What an answer must look like, in the words of the OpenAI API and in those of vLLM, old and new."""

from typing import Annotated, Any

from msgspec import Meta, Struct

from eventing.wire.structured_outputs import MAX_CHOICES, GrammarText, StructuredOutputs


class TextFormat(Struct, frozen=True, tag_field="type", tag="text"):
    pass


class JSONObjectFormat(Struct, frozen=True, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    pass


class JSONSchema(Struct, frozen=True, forbid_unknown_fields=True):
    """`strict` changes nothing: an answer is always as the schema says."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class JSONSchemaFormat(Struct, frozen=True, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    json_schema: JSONSchema


ResponseFormat = TextFormat | JSONObjectFormat | JSONSchemaFormat


class StructuredOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`guided_*` are vLLM's names until 0.11."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | GrammarText | None = None
    guided_regex: GrammarText | None = None
    guided_choice: Annotated[tuple[GrammarText, ...], Meta(min_length=1, max_length=MAX_CHOICES)] | None = None
    guided_grammar: GrammarText | None = None
    guided_decoding_backend: str | None = None

    def asked_structure(self) -> StructuredOutputs | None:
        """Raises ValueError where it is said twice."""
        said = [each for each in (self._format(), self.structured_outputs, *self._guided()) if each is not None]
        if len(said) > 1:
            raise ValueError("what the answer must look like is said more than once; keep one of its options")
        return said[0] if said else None

    def _format(self) -> StructuredOutputs | None:
        match self.response_format:
            case JSONObjectFormat():
                return StructuredOutputs(json_object=True)
            case JSONSchemaFormat(json_schema):
                return StructuredOutputs(json=json_schema.schema or {})
        return None

    def _guided(self) -> list[StructuredOutputs]:
        guided: list[StructuredOutputs] = []
        if self.guided_json is not None:
            guided.append(StructuredOutputs(json=self.guided_json))
        if self.guided_regex is not None:
            guided.append(StructuredOutputs(regex=self.guided_regex))
        if self.guided_choice is not None:
            guided.append(StructuredOutputs(choice=self.guided_choice))
        if self.guided_grammar is not None:
            guided.append(StructuredOutputs(grammar=self.guided_grammar))
        return guided
