"""Writes every generated file of this repository: `make generate`. `make check` fails if one is out of date.

Each file is a function of the code alone. What a benchmark writes is not here: bench/report.py writes its section.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import click
import gguf
import numpy as np
from msgspec import inspect

from bench.report import with_section
from eventing.wire.faults import describe
from functions.configuration.environment_page import markdown_page
from functions.gateway.openai.requests import ChatRequest, CompletionRequest
from functions.gateway.openai.responses_requests import ResponsesRequest
from knative.__main__ import main as command_line
from knative.commands.families import markdown_table
from knative.render.dashboard import dashboard
from knative.render.gitops import with_kustomization
from knative.render.monitoring import rule_groups
from knative.render.rendering import render, resolve
from knative.spec.kubernetes_object import to_yaml
from knative.spec.spec_file import load_spec
from storage.checkpoints.gguf_config import ARCHITECTURES, VARIANTS
from storage.checkpoints.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer
from storage.models.blocks import FORMATS

ROOT = Path(__file__).resolve().parent.parent
OPENAI_REQUESTS = {"chat": ChatRequest, "completions": CompletionRequest, "responses": ResponsesRequest}
OPTIONS_HEAD = """\
Written by `make generate` from the types that check requests. What an option does not take is refused by name, and so is an
option that is not listed. `null` is the same as leaving the option out.

| option | of | takes | meaning |
|---|---|---|---|
"""


def generated() -> Iterator[tuple[Path, str]]:
    """Every generated file with its text."""
    yield ROOT / "docs" / "reference.md", reference_page((ROOT / "docs" / "reference.md").read_text(encoding="utf-8"))
    openai_page = (ROOT / "docs" / "openai.md").read_text(encoding="utf-8")
    yield ROOT / "docs" / "openai.md", with_section(openai_page, "options", options_table())
    yield ROOT / "monitoring" / "dashboard.json", json.dumps(dashboard(), indent=1) + "\n"
    yield ROOT / "monitoring" / "alerts.yaml", to_yaml([{"groups": rule_groups()}])
    for spec in sorted((ROOT / "examples").glob("*/pipeline.yaml")):
        for name, objects in with_kustomization(render(resolve(load_spec(spec), _no_store))).items():
            yield spec.parent / "rendered" / name, to_yaml(objects)


def _no_store(dtype: str) -> NoReturn:
    raise AssertionError(f"an example does not pin its cut or its digest for {dtype}")


def stale() -> list[str]:
    """Files that are missing or differ, and files in generated folders that no rule generates."""
    files = dict(generated())
    wrong = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    extra = [path for path in (ROOT / "examples").glob("*/rendered/*") if path not in files]
    return sorted(path.relative_to(ROOT).as_posix() for path in [*wrong, *extra])


def write() -> None:
    for path in (ROOT / "examples").glob("*/rendered/*"):
        path.unlink()
    for path, text in generated():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def reference_page(page: str) -> str:
    """The page with its generated sections ("Environment", "Commands", "Families", tables of formats) made again."""
    page = with_section(with_section(page, "environment", markdown_page()), "commands", commands_section())
    families = f"## Families\nWritten by `make generate` from `python -m knative families`.\n\n{markdown_table()}"
    page = with_section(page, "families", families)
    page = with_section(page, "gguf-architectures", architectures_table())
    page = with_section(page, "gguf-tokenizers", tokenizer_rules_table())
    return with_section(page, "gguf-blocks", blocks_table())


def commands_section() -> str:
    """`--help` of the command line and of each command."""
    settings = {"terminal_width": 100, "max_content_width": 100, **command_line.context_settings}
    context = click.Context(command_line, info_name="python -m knative", **settings)
    origin = "Written by `make generate` from `--help`. In this folder `python` is `.venv/bin/python`."
    parts = ["## Commands", origin, _block(command_line.get_help(context))]
    for name in command_line.list_commands(context):
        command = command_line.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context, terminal_width=100, max_content_width=100)
        parts += [f"### {name}", _block(command.get_help(inner))]
    return "\n\n".join(parts)


def architectures_table() -> str:
    """The architectures of GGUF files that are read, and what is undone of how llama.cpp stores them."""
    rows = []
    for name, architecture in ARCHITECTURES.items():
        kinds = (architecture, *(row for row, _ in VARIANTS.get(name, ())))
        undone = {
            "queries and keys are interleaved": any(kind.permuted for kind in kinds),
            "norms are stored plus one": architecture.norm_plus_one,
            "queries, keys and values are regrouped": architecture.grouped_qkv,
            "numbers of layers are in the metadata": bool(architecture.numbers),
            "heads of values are in another order": bool(architecture.rows),
            "decay is stored as -exp(A_log)": any("ssm_a" in merge.parts for kind in kinds for merge in kind.merges.values()),
            "tensors are in parts, transposed or of another shape": any(kind.merges for kind in kinds),
        }
        types = dict.fromkeys(f"`{kind.model_type}`" for kind in kinds)
        rows.append((f"`{name}`", ", ".join(types), "; ".join(text for text, is_so in undone.items() if is_so)))
    return _table(("`general.architecture`", "`model_type`", "what the file stores in another way"), rows)


def tokenizer_rules_table() -> str:
    """The rules of `tokenizer.ggml.pre`; those that cut text alike in one row."""
    rules: dict[PreTokenizer, list[str]] = {}
    for name, rule in PRE_TOKENIZERS.items():
        rules.setdefault(rule, []).append(f"`{name}`")
    rows = [(", ".join(names), "yes" if rule.ignore_merges else "no") for rule, names in rules.items()]
    return _table(("rules", "a word that is a token stays whole"), rows)


def blocks_table() -> str:
    """The quantizations of GGUF files."""
    rows = []
    for kind, (items, size) in gguf.GGML_QUANT_SIZES.items():
        with suppress(NotImplementedError):
            if items > 1 and len(gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)):
                kept = "yes" if kind.name in FORMATS else "widened to bfloat16"
                rows.append((f"`{kind.name}`", f"{8 * size / items:g}", kept))
    return _table(("format", "bits per weight", "kept by dtype `kept`"), rows)


def options_table() -> str:
    """The options of the OpenAI API, from the types that decide which requests are served."""
    requests: dict[tuple[str, str, str], list[str]] = {}  # by name, what it takes, meaning
    for request, type_ in OPENAI_REQUESTS.items():
        for row in _options(inspect.type_info(type_), ""):
            requests.setdefault(row, []).append(request)
    names: dict[tuple[str, str, str], list[str]] = {}  # of options that differ in nothing else, which share a row
    for (name, takes, meaning), of in requests.items():
        names.setdefault(("all" if len(of) == len(OPENAI_REQUESTS) else ", ".join(of), takes, meaning), []).append(f"`{name}`")
    return OPTIONS_HEAD + "".join(
        f"| {', '.join(each)} | {of} | {takes} | {meaning} |\n" for (of, takes, meaning), each in names.items()
    )


def _options(type_: inspect.Type, prefix: str) -> Iterator[tuple[str, str, str]]:
    """A row for each option of a request's type that has a description, followed by those of its own options."""
    for field in type_.fields if isinstance(type_, inspect.StructType) else ():
        if not isinstance(field.type, inspect.Metadata):
            continue
        name, meaning = f"{prefix}{field.encode_name}", (field.type.extra_json_schema or {})["description"]
        yield name, describe(field.type), meaning
        inner = field.type.type
        for each in inner.types if isinstance(inner, inspect.UnionType) else (inner,):
            yield from _options(each, f"{name}.")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _block(text: str) -> str:
    return f"```\n{text.rstrip()}\n```"


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; name the files that are not up to date, with status 1.")
def main(check: bool) -> None:
    """Write every generated file anew."""
    if not check:
        write()
    elif files := stale():
        sys.exit(f"not up to date: {', '.join(files)}; run: make generate")


if __name__ == "__main__":
    main()
