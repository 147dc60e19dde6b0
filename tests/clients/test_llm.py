"""The command line `llm`."""

from pathlib import Path

from tests.clients.conftest import Run, needs
from tests.support.functions.functions import FunctionProcess
from tests.support.storage.published import Published

pytestmark = needs("llm")


def test_llm_prints_the_answer(gateway: FunctionProcess, published: Published, run_client: Run, tmp_path: Path) -> None:
    models = tmp_path / "llm"
    models.mkdir()
    line = f"- model_id: tiny\n  model_name: tiny\n  api_base: {gateway.url}/v1\n  api_key_name: none\n"
    (models / "extra-openai-models.yaml").write_text(line)
    ids = published.tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).ids
    expected = published.tokenizer.decode(published.expected(ids, 8))
    options = ["-m", "tiny", "-o", "temperature", "0", "-o", "max_tokens", "8", "--key", "none", "Hi"]
    for stream in ([], ["--no-stream"]):
        done = run_client("llm", *options, *stream, LLM_USER_PATH=str(models))
        assert done.stdout == expected + "\n"
