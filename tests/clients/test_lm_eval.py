"""lm-eval on a small generated task: log-likelihoods and answers are those of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.clients.conftest import Run, needs
from tests.support.functions.functions import FunctionProcess
from tests.support.storage.published import Published

pytestmark = needs("lm_eval")
QUESTIONS = [
    {"question": "The capital of France is", "choices": [" Paris", " London", " the"], "answer": 0},
    {"question": "2 + 2 =", "choices": [" 4", " five", " 22"], "answer": 0},
    {"question": "日本", "choices": [" Nippon", " x"], "answer": 0},
]
CHOICE_TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATE_TASK = """\
task: tiny_generate
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "choice.yaml").write_text(CHOICE_TASK % data)
    (folder / "generate.yaml").write_text(GENERATE_TASK % data)
    return folder


def evaluate(run_client: Run, tasks: Path, task: str, model: str, arguments: dict[str, object], *more: str) -> list[Any]:
    """The samples that lm-eval wrote, in the order of the questions."""
    output = tasks.parent / "results"
    joined = ",".join(f"{name}={value}" for name, value in arguments.items())
    options = ["--include_path", str(tasks), "--output_path", str(output), "--log_samples", *more]
    run_client("lm_eval", "run", "--model", model, "--model_args", joined, "--tasks", task, *options)
    (samples,) = output.rglob(f"samples_{task}_*.jsonl")
    return sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def log_likelihood(published: Published, context: str, continuation: str) -> tuple[float, bool]:
    """Log-likelihood by lm-eval's definition, from the whole model, and whether each token is the most probable one."""
    whole = published.tokenizer.encode(context + continuation, add_special_tokens=False).ids
    begin = len(published.tokenizer.encode(context, add_special_tokens=False).ids)
    with torch.inference_mode():
        truth = torch.log_softmax(published.model(torch.tensor([whole])).logits[0].float(), -1)
    places = range(begin, len(whole))
    exact = all(truth[place - 1].argmax().item() == whole[place] for place in places)
    return sum(truth[place - 1][whole[place]].item() for place in places), exact


def test_log_likelihoods_are_transformers(
    gateway: FunctionProcess, published: Published, run_client: Run, tasks: Path, tokenizer_folder: Path
) -> None:
    arguments = {
        "model": "tiny",
        "base_url": f"{gateway.url}/v1/completions",
        "tokenizer": tokenizer_folder,
        "tokenizer_backend": "huggingface",
        "max_length": 256,
        "num_concurrent": 2,
    }
    samples = evaluate(run_client, tasks, "tiny_choice", "local-completions", arguments)
    assert len(samples) == len(QUESTIONS)
    for sample, question in zip(samples, QUESTIONS, strict=True):
        for (found, exact), choice in zip(sample["filtered_resps"], question["choices"], strict=True):
            expected = log_likelihood(published, str(question["question"]), choice)
            assert (float(found), str(exact) == "True") == (pytest.approx(expected[0], abs=1e-3), expected[1])


def test_answers_through_the_chat_are_transformers(
    gateway: FunctionProcess, published: Published, run_client: Run, tasks: Path
) -> None:
    arguments = {"model": "tiny", "base_url": f"{gateway.url}/v1/chat/completions", "num_concurrent": 2}
    samples = evaluate(run_client, tasks, "tiny_generate", "local-chat-completions", arguments, "--apply_chat_template")
    assert len(samples) == len(QUESTIONS)
    for sample, question in zip(samples, QUESTIONS, strict=True):
        prompt = f"<|im_start|>user\n{question['question']}<|im_end|>\n<|im_start|>assistant\n"
        ids = published.tokenizer.encode(prompt, add_special_tokens=False).ids
        expected = published.tokenizer.decode(published.expected(ids, 8))
        assert sample["resps"] == [[expected]]
