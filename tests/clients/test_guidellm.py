"""guidellm runs a whole benchmark."""

import json
from pathlib import Path

import pytest

from tests.clients.conftest import Run, needs
from tests.support.functions.functions import FunctionProcess

pytestmark = needs("guidellm")
REQUESTS = 6


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm_completes_all_requests(
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
