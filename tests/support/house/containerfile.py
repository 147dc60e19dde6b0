"""Reads a Containerfile, as far as this project's goes: one stage, FROM ARG ENV WORKDIR COPY RUN USER EXPOSE ENTRYPOINT."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template


@dataclass(frozen=True)
class Step:
    """A RUN or COPY, with what the environment is when its turn comes."""

    instruction: str
    value: str
    environment: Mapping[str, str]


@dataclass
class Containerfile:
    """What building it means."""

    base: str = ""
    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    steps: list[Step] = field(default_factory=list)
    user: str = "0"
    entrypoint: tuple[str, ...] = ()


def read_containerfile(path: Path, base_environment: Mapping[str, str], **build_arguments: str) -> Containerfile:
    """build_arguments: as `--build-arg` gives them. Raises ValueError for an instruction it does not know."""
    file = Containerfile(environment=dict(base_environment))
    for instruction, value in _instructions(path.read_text(encoding="utf-8")):
        _apply(file, instruction, value, build_arguments)
    return file


def _instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def _apply(file: Containerfile, instruction: str, value: str, build_arguments: Mapping[str, str]) -> None:
    expanded = Template(value).safe_substitute({**file.arguments, **file.environment})
    match instruction:
        case "FROM":
            file.base = expanded
        case "ARG":
            name, _, default = expanded.partition("=")
            file.arguments[name] = build_arguments.get(name, default)
        case "ENV":
            for name, _, text in (pair.partition("=") for pair in expanded.split()):
                file.environment[name] = text
        case "WORKDIR":
            file.workdir = expanded
        case "COPY" | "RUN":
            file.steps.append(Step(instruction, value, {**file.arguments, **file.environment}))
        case "USER":
            file.user = expanded
        case "ENTRYPOINT":
            file.entrypoint = tuple(json.loads(value))
        case "EXPOSE":
            pass
        case _:
            raise ValueError(f"{instruction} {value}: not known here; teach tests/support/house/containerfile.py")
