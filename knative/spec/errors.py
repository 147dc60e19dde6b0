"""What can be wrong with what a person asked for; one class per condition."""


class SpecError(ValueError):
    """The spec cannot be used. The message names the path and the value, and says what is allowed."""


class TooManyStages(ValueError):
    """More stages than layers: some would have nothing to do."""


class UnknownShape(ValueError):
    """The model's shape cannot be told. The message names what is missing and where it was looked for."""
