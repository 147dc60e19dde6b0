"""Reads frozen dataclasses from a mapping of strings. Each key is declared once, and all errors are raised together.

`config` declares Lamina's keys with this module. A field declared with `setting()` is read from its key. A field whose type is
another such dataclass is read from the same mapping.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final, TypeVar, get_type_hints

REQUIRED: Final = "\0"  # stands for the default of a key that must be set

_KEY: Final = "key"
T = TypeVar("T")


class ConfigError(Exception):
    """The environment cannot be used. `errors` has one sentence for each mistake in it."""

    def __init__(self, errors: Collection[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = tuple(errors)


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """One key of the environment, with its parser, meaning and default."""

    name: str
    parse: Callable[[str], Any]  # raises ValueError that says what is allowed
    meaning: str
    default: str  # text as it would be set in the environment; empty: the value is None
    secret: bool  # errors and repr do not show the value
    closes: bool = False  # restricts access, which is open if the key is unset; so an empty value is an error

    def read(self, environ: Mapping[str, str]) -> Any:
        """Returns the parsed value. Returns None if the key is unset and its default is empty.

        Raises ValueError; it names the key, its value and what is allowed.
        """
        if self.closes and environ.get(self.name) == "":
            raise ValueError(f"{self.name} is set and empty: give it a value, or unset it ({self.meaning})")
        text = environ.get(self.name, "") or self.default
        if text == REQUIRED:
            raise ValueError(f"{self.name} is not set ({self.meaning})")
        if not text:
            return None
        try:
            return self.parse(text)
        except ValueError as error:
            shown = "its value (not shown)" if self.secret else repr(text)
            raise ValueError(f"{self.name}: {shown} is not allowed: {error}") from error


def setting(
    name: str, parse: Callable[[str], Any], meaning: str, default: str = REQUIRED, *, secret: bool = False, closes: bool = False
) -> Any:
    """Declares a dataclass field that is read from the key `name`. The arguments are the fields of Key."""
    key = Key(name, parse, meaning, default, secret, closes)
    return dataclasses.field(metadata={_KEY: key}, repr=not secret)


def optional(name: str, parse: Callable[[str], Any], meaning: str, *, secret: bool = False, closes: bool = False) -> Any:
    """Declares a `setting` that is None if its key is unset."""
    return setting(name, parse, meaning, "", secret=secret, closes=closes)


def keys(settings: type) -> Iterator[Key]:
    """Yields the keys of a dataclass and of the dataclasses nested in it, in the order of the fields."""
    hints = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if _KEY in field.metadata:
            yield field.metadata[_KEY]
        elif dataclasses.is_dataclass(hints[field.name]):
            yield from keys(hints[field.name])


def read(settings: type[T], environ: Mapping[str, str]) -> T:
    """Returns an instance of the dataclass `settings`, read from the environment. Raises ConfigError with all mistakes."""
    errors: list[str] = []
    found: T | None = _read(settings, environ, errors)
    if found is None:
        raise ConfigError(errors)
    return found


def _read(settings: Any, environ: Mapping[str, str], errors: list[str]) -> Any:
    """Like `read`, but adds mistakes to `errors`, and returns None if there are any."""
    values: dict[str, Any] = {}
    hints = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if _KEY not in field.metadata:
            values[field.name] = _read(hints[field.name], environ, errors)
            continue
        try:
            values[field.name] = field.metadata[_KEY].read(environ)
        except ValueError as error:
            errors.append(str(error))
    try:
        return None if errors else settings(**values)
    except ValueError as error:  # of a dataclass's own __post_init__
        errors.append(str(error))
        return None
