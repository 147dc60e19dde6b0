"""Errors in a spec or a model, one class per condition."""


class SpecError(ValueError):
    """The spec cannot be used. The message names the path and the value, and says what is allowed."""


class TooManyStages(ValueError):
    """The model has fewer layers than the pipeline has stages."""


class UnknownShape(ValueError):
    """The model's sizes cannot be derived. The message names what is missing and where it was looked for."""


def split_path(message: str) -> tuple[str, str]:
    """A message of msgspec.ValidationError → what was expected, and the path in the document (`$` for the document itself)."""
    text, _, rest = message.partition(" - at `")
    return text, rest.rstrip("`") or "$"
