"""Reads a Containerfile as far as this project's goes: stages, FROM ARG ENV WORKDIR COPY RUN USER EXPOSE ENTRYPOINT."""

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
class Stage:
    """What building it means. All but the steps comes from its base, too."""

    base: str
    """Another stage, or an image."""
    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    steps: list[Step] = field(default_factory=list)
    """Its own."""
    user: str = "0"
    entrypoint: tuple[str, ...] = ()


def read_containerfile(path: Path, base_environment: Mapping[str, str], **build_arguments: str) -> dict[str, Stage]:
    """Stages by name, the default one last. build_arguments: as `--build-arg` gives them.

    Raises ValueError for an instruction it does not know, and for a stage without a name.
    """
    stages: dict[str, Stage] = {}
    outside: dict[str, str] = {}
    for instruction, value in _instructions(path.read_text(encoding="utf-8")):
        if instruction == "FROM":
            image, _, name = Template(value).substitute(outside).partition(" AS ")
            if not name:
                raise ValueError(f"FROM {value}: without a name")
            stages[name] = _begun(image, stages, base_environment)
        elif instruction == "ARG":
            arguments = stages[[*stages][-1]].arguments if stages else outside
            argument, _, default = value.partition("=")
            arguments[argument] = build_arguments.get(argument, default)
        else:
            _apply(stages[[*stages][-1]], instruction, value)
    return stages


def _begun(image: str, stages: Mapping[str, Stage], base_environment: Mapping[str, str]) -> Stage:
    if image not in stages:
        return Stage(image, environment=dict(base_environment))
    base = stages[image]
    return Stage(image, {}, dict(base.environment), base.workdir, [], base.user, base.entrypoint)


def _instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def _apply(stage: Stage, instruction: str, value: str) -> None:
    expanded = Template(value).safe_substitute({**stage.arguments, **stage.environment})
    match instruction:
        case "ENV":
            for name, _, text in (pair.partition("=") for pair in expanded.split()):
                stage.environment[name] = text
        case "WORKDIR":
            stage.workdir = expanded
        case "COPY" | "RUN":
            stage.steps.append(Step(instruction, value, {**stage.arguments, **stage.environment}))
        case "USER":
            stage.user = expanded
        case "ENTRYPOINT":
            stage.entrypoint = tuple(json.loads(value))
        case "EXPOSE":
            pass
        case _:
            raise ValueError(f"{instruction} {value}: not known here; teach tests/support/house/containerfile.py")
