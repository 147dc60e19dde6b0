"""guidellm to its end, and the command line `llm`."""

import json
from pathlib import Path

import pytest

from tests.clients.conftest import Run
from tests.support.functions.functions import FunctionProcess
from tests.support.storage.published import Published, until_end
from tests.support.storage.tiny_models import greedy

REQUESTS = 6


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm_measures_to_its_end(
    gateway: FunctionProcess, run_client: Run, tokenizer_folder: Path, tmp_path: Path, path: str
) -> None:
    output = tmp_path / "report.json"
    run_client(
        "guidellm",
        "run",
        *("--backend", f"kind=openai_http,target={gateway.url},model=tiny,request_format={path},http2=false"),
        *("--tokenizer", json.dumps({"kind": "hf_auto", "model": str(tokenizer_folder)})),
        *("--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=6"),
        *("--profile", "kind=concurrent,streams=2"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--output", f"kind=json,path={output}"),
        "--disable-console-interactive",
    )
    (benchmark,) = json.loads(output.read_text())["benchmarks"]
    assert benchmark["metrics"]["request_totals"] == {"successful": REQUESTS, "incomplete": 0, "errored": 0, "total": REQUESTS}


def test_the_command_line_llm_answers(gateway: FunctionProcess, published: Published, run_client: Run, tmp_path: Path) -> None:
    models = tmp_path / "llm"
    models.mkdir()
    line = f"- model_id: tiny\n  model_name: tiny\n  api_base: {gateway.url}/v1\n  api_key_name: none\n"
    (models / "extra-openai-models.yaml").write_text(line)
    ids = published.tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).ids
    expected = published.tokenizer.decode(until_end(greedy(published.model, ids, 8)))
    options = ["-m", "tiny", "-o", "temperature", "0", "-o", "max_tokens", "8", "--key", "none", "Hi"]
    for stream in ([], ["--no-stream"]):
        done = run_client("llm", *options, *stream, LLM_USER_PATH=str(models))
        assert done.stdout == expected + "\n"
