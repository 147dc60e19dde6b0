"""The options of the OpenAI API as a table of docs/openai.md, from the types that decide which requests are served."""

from collections.abc import Iterator
from typing import Final

from msgspec import inspect

from eventing.wire.faults import describe
from functions.gateway.openai.requests import ChatRequest, CompletionRequest
from functions.gateway.openai.responses_requests import ResponsesRequest

_REQUESTS: Final = {"chat": ChatRequest, "completions": CompletionRequest, "responses": ResponsesRequest}
_HEAD: Final = """\
Written by `make generate` from the types that check requests. What an option does not take is refused by name, and so is an
option that is not listed. `null` is the same as leaving the option out.

| option | of | takes | meaning |
|---|---|---|---|
"""


def markdown_table() -> str:
    requests: dict[tuple[str, str, str], list[str]] = {}  # by name, what it takes, meaning
    for request, type_ in _REQUESTS.items():
        for row in _rows(inspect.type_info(type_), ""):
            requests.setdefault(row, []).append(request)
    names: dict[tuple[str, str, str], list[str]] = {}  # of options that differ in nothing else, which share a row
    for (name, takes, meaning), of in requests.items():
        names.setdefault(("all" if len(of) == len(_REQUESTS) else ", ".join(of), takes, meaning), []).append(f"`{name}`")
    return _HEAD + "".join(
        f"| {', '.join(each)} | {of} | {takes} | {meaning} |\n" for (of, takes, meaning), each in names.items()
    )


def _rows(type_: inspect.Type, prefix: str) -> Iterator[tuple[str, str, str]]:
    """A row for each option of a request's type that has a description, followed by those of its own options."""
    for field in type_.fields if isinstance(type_, inspect.StructType) else ():
        if not isinstance(field.type, inspect.Metadata):
            continue
        name, meaning = f"{prefix}{field.encode_name}", (field.type.extra_json_schema or {})["description"]
        yield name, describe(field.type), meaning
        inner = field.type.type
        for each in inner.types if isinstance(inner, inspect.UnionType) else (inner,):
            yield from _rows(each, f"{name}.")
