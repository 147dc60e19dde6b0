"""The results of one part of a batch as one object: a head, answers, errors. So they appear all at once."""

from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec
from msgspec import Struct

ResultsContent = Literal["output", "errors"]
RESULTS: Final[tuple[ResultsContent, ...]] = ("output", "errors")

HEAD_BYTES: Final = 512  # with blanks up to its end


class ResultsHead(Struct, frozen=True, kw_only=True):
    """The head of one object with results: counts of it. The object is `HEAD_BYTES + output_bytes + error_bytes` long."""

    output_bytes: int = 0
    error_bytes: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    answered: tuple[int, ...] = ()  # numbers of the lines in the part, in the order of their answers
    failed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LineResult:
    line: bytes  # of the output or the error file, with its newline
    failed: bool
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(slots=True)
class PartResults:
    """Lines of the output file and of the error file, with their newlines.

    Each has as its key the number of the request's line in the part.
    """

    answers: dict[int, bytes] = field(default_factory=dict)
    errors: dict[int, bytes] = field(default_factory=dict)
    input_tokens: int = 0
    output_tokens: int = 0

    def add(self, number: int, result: LineResult) -> None:
        (self.errors if result.failed else self.answers)[number] = result.line
        self.input_tokens += result.input_tokens
        self.output_tokens += result.output_tokens

    def copy(self) -> "PartResults":
        return PartResults(self.answers.copy(), self.errors.copy(), self.input_tokens, self.output_tokens)

    def __contains__(self, number: int) -> bool:
        return number in self.answers or number in self.errors

    def __len__(self) -> int:
        return len(self.answers) + len(self.errors)

    def lines(self, content: ResultsContent) -> bytes:
        by_number = self.answers if content == "output" else self.errors
        return b"".join(by_number[number] for number in sorted(by_number))

    def encode(self) -> bytes:
        output, errors = self.lines("output"), self.lines("errors")
        head = ResultsHead(
            output_bytes=len(output),
            error_bytes=len(errors),
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            answered=tuple(sorted(self.answers)),
            failed=tuple(sorted(self.errors)),
        )
        return msgspec.json.encode(head).ljust(HEAD_BYTES) + output + errors

    @classmethod
    def decode(cls, data: bytes) -> "PartResults | None":
        """Decodes the object with the results of a part. Returns None if the bytes are no results or incomplete."""
        head = read_head(data[:HEAD_BYTES])
        if head is None or len(data) != HEAD_BYTES + head.output_bytes + head.error_bytes:
            return None
        lines = [line + b"\n" for line in data[HEAD_BYTES:].split(b"\n")]
        answers = dict(zip(head.answered, lines, strict=False))
        errors = dict(zip(head.failed, lines[len(answers) :], strict=False))
        return cls(answers, errors, head.input_tokens, head.output_tokens)


def read_head(data: bytes) -> ResultsHead | None:
    """Decodes the first HEAD_BYTES of an object with results. Returns None if they are no such head."""
    try:
        return msgspec.json.decode(data, type=ResultsHead)
    except msgspec.DecodeError:
        return None
