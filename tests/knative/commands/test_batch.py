"""`batch` against a real gateway: it sends a file, shows how far it is, and writes the results."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from functions.gateway.jobs.files import PART_LINES
from knative.__main__ import main
from tests.support.functions.functions import FunctionProcess, running_gateway
from tests.support.storage.published import Published

KEY = "a-client-key"


@pytest.fixture(scope="module")
def gateway(published: Published, stages: list[FunctionProcess]) -> Iterator[FunctionProcess]:
    with running_gateway(published, stages, LAMINA_JOBS_STORE="lamina/jobs", LAMINA_API_KEYS=KEY) as gateway:
        yield gateway


def line(number: int, model: str = "tiny") -> dict[str, Any]:
    body = {"model": model, "prompt": f"Say {number}", "temperature": 0, "max_tokens": 4}
    return {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}


def test_the_command_sends_a_file_and_writes_its_results(gateway: FunctionProcess, tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    count = PART_LINES + 1
    lines = [*map(line, range(count)), line(count, "other")]
    requests.write_text("".join(json.dumps(each) + "\n" for each in lines))
    options = ["--url", gateway.url, "--api-key", KEY]
    said = CliRunner().invoke(main, ["batch", str(requests), *options])
    assert said.exit_code == 0, said.output
    assert f"has {count + 1} lines" in said.output
    assert f"{count + 1}/{count + 1}" in said.output.replace(" ", "")
    assert "tokens/s" in said.output
    (id_,) = re.findall("batch_[0-9a-f]+", said.output.partition(" has ")[0])
    answers, errors = tmp_path / "requests.output.jsonl", tmp_path / "requests.errors.jsonl"
    assert [json.loads(each)["custom_id"] for each in answers.read_text().splitlines()] == [f"line-{n}" for n in range(count)]
    assert [json.loads(each)["custom_id"] for each in errors.read_text().splitlines()] == [f"line-{count}"]
    again = CliRunner().invoke(main, ["batch", id_, *options, "--output", str(tmp_path / "again.jsonl")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.jsonl").read_bytes() == answers.read_bytes()
    assert (tmp_path / "again.errors.jsonl").read_bytes() == errors.read_bytes()


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "first line is no request"), ('{"url": "/v1/images/generations"}\n', "batches may ask")],
    ids=["empty", "endpoint"],
)
def test_the_command_says_what_is_wrong(gateway: FunctionProcess, tmp_path: Path, content: str, said: str) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text(content)
    result = CliRunner().invoke(main, ["batch", str(requests), "--url", gateway.url, "--api-key", KEY])
    assert result.exit_code == 1
    assert said in result.output
