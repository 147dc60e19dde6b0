"""The page in a real browser, over a real pipeline of the packaged model.

The tests are one scenario, in order: each needs the state that the one before left.
"""

import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from storage.models.adapter_publisher import publish_adapter
from tests.support.functions.browser import Browser, needs_browser
from tests.support.functions.real_pipeline import RealPipeline, real_pipeline

pytestmark = [needs_browser, pytest.mark.timeout(600)]

WIDE = (1360, 1010)
NARROW = (412, 840)
CONVERSATIONS = 6
LONG_TOKENS = 160
WIDTH = 576  # of the packaged model's hidden states
MOST_REPLICAS = """
const stages = [...document.querySelectorAll(".replicas")];
return Math.max(...stages.map(each => each.querySelectorAll(".replica").length));
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealPipeline]:
    with real_pipeline(tmp_path_factory.mktemp("pipeline"), with_key=True) as pipeline:
        yield pipeline


def until_answered(page: Browser, answers: int) -> None:
    page.until(lambda: page.text(".turn.assistant .note").count("tokens, first after") == answers, f"{answers} answers")


def clear_conversation(page: Browser) -> None:
    page.find("#new").click()
    page.until(lambda: not page.text("#turns"), "an empty conversation")


def test_the_page_asks_for_a_key_and_keeps_it_in_the_tab_only(page: Browser, pipeline: RealPipeline) -> None:
    page.until(lambda: page.text("#link") == "needs an API key", "that a key is needed")
    page.ask("What is the capital of France?")
    page.until(lambda: "An API key is needed" in page.text("[role=alert]"), "the refusal")
    assert not page.violations()
    page.find(".turn .primary").click()
    page.until(lambda: page.find("#key-field").is_displayed(), "the dialog")
    assert not page.violations()
    page.find("#key-field").send_keys(f"{pipeline.api_key}\n")
    page.until(lambda: page.text("#link") == "live", "the stream")
    kept = page.run("return [Object.values(sessionStorage), Object.values(localStorage), document.cookie, location.href]")
    assert kept == [[pipeline.api_key], ["system"], "", f"{pipeline.url}/"]
    assert all("401" in line for line in page.console()), "the console has the refusals only"


def test_the_refused_question_is_asked_again_and_answered(page: Browser) -> None:
    until_answered(page, 1)
    assert "Paris" in page.text(".turn.assistant .said")
    assert "Paris" in page.run("return document.getElementById('say').textContent"), "it is read out when it is whole"
    assert page.run("return document.activeElement.id") in ("question", "")


def test_a_cold_start_is_shown_with_its_phases(page: Browser, pictures: Path) -> None:
    page.until(lambda: page.text(".stage").count("At zero: no replica runs.") == 3, "all stages asleep")
    page.until(lambda: "Stage 2 is at zero" in page.text("#happened"), "the announcement")
    clear_conversation(page)
    assert not page.violations()
    page.ask("Why is the sky blue?")
    page.until(lambda: page.text(".start.under-way").count("Starting from zero") == 3, "all stages waking at once")
    page.until(lambda: "Waiting: stage " in page.text(".turn.assistant .note"), "what the answer awaits")
    page.picture(pictures / "page-cold-start.png")
    page.until(lambda: page.text(".start").count("Cold start ") == 3, "all stages awake")
    for phase in ("Knative", "process", "imports", "weights"):
        assert page.text(".start .phases").count(f"{phase} ") == 3, phase
    assert "cold start took" in page.text("#happened")
    page.until(lambda: page.find("#wire path").get_attribute("d"), "the route")
    assert page.run("return document.querySelectorAll('.replica.on-route').length") == 3
    page.until(lambda: len(page.text(".turn.assistant .said")) > 300, "a part of the answer")
    page.find("#stop").click()
    page.until(lambda: page.text(".turn.assistant .note") == "Stopped.", "the end")


class Load:
    """Other clients that send one request after another."""

    def __init__(self, pipeline: RealPipeline) -> None:
        self._enough = threading.Event()
        self.answered: list[int] = []  # tokens of each answer
        self._pipeline = pipeline
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CONVERSATIONS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join(120)

    def _ask(self, number: int) -> None:
        asked = {
            "model": self._pipeline.model,
            "prompt": f"{number} is a number",
            "max_tokens": LONG_TOKENS,
            "ignore_eos": True,
        }
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._pipeline.api_key}"}
        request = urllib.request.Request(f"{self._pipeline.url}/v1/completions", json.dumps(asked).encode(), headers)
        while not self._enough.is_set():
            with urllib.request.urlopen(request, timeout=120) as reply:
                self.answered.append(json.load(reply)["usage"]["completion_tokens"])


def test_a_replica_is_added_under_load(page: Browser, pipeline: RealPipeline, pictures: Path) -> None:
    clear_conversation(page)
    page.until(lambda: page.run(MOST_REPLICAS) <= 1, "one replica of each stage, or none")
    with Load(pipeline) as load:
        page.until(lambda: page.run(MOST_REPLICAS) == 2, "another replica")
        page.until(lambda: max(pipeline.replicas()) == 2, "its readiness")
        page.until(lambda: page.text("#happened").count("is ready") >= 1, "the announcement")
        page.ask("Tell me about the sea.")
        page.until(lambda: len(page.text(".turn.assistant .said")) > 200, "a part of an answer amid others")
        page.until(lambda: page.run("return document.querySelectorAll('.replica.on-route').length") == 3, "its route")
        page.picture(pictures / "page-light.png")
        page.prefer("dark")
        page.picture(pictures / "page-dark.png")
        assert not page.violations()
        page.prefer("light")
        assert float(page.text("#rate")) > 0
        page.until(lambda: len(page.text(".turn.assistant .said")) > 700, "more of it")
        page.find("#stop").click()
        page.until(lambda: page.text(".turn.assistant .note") == "Stopped.", "the end")
    assert len(load.answered) >= CONVERSATIONS
    assert set(load.answered) == {LONG_TOKENS}


def test_an_adapter_is_chosen_for_the_next_answers(
    page: Browser, pipeline: RealPipeline, tmp_path: Path, pictures: Path
) -> None:
    assert not page.find("#adapters").is_displayed(), "there is none yet"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    module, random = "base_model.model.model.layers.0.self_attn.q_proj", np.random.default_rng(0)
    shapes = {"lora_A": (4, WIDTH), "lora_B": (WIDTH, 4)}
    matrices = {f"{module}.{name}.weight": random.standard_normal(shape, np.float32) / 9 for name, shape in shapes.items()}
    save_file(matrices, tmp_path / "adapter_model.safetensors")
    publish_adapter(pipeline.store, pipeline.model, "support", tmp_path)
    clear_conversation(page)
    page.until(lambda: page.text("#adapter-list .name").split() == [pipeline.model, "support"], "the adapter")
    assert "published" in page.text("#adapter-list .state")
    page.find("#adapter-list li:last-child button").send_keys("\n")
    page.until(lambda: page.text("#model") == f"{pipeline.model}:support", "the choice")
    page.ask("Tell me about the sea.")
    page.until(lambda: "loaded, 1 answering" in page.text("#adapter-list .state"), "its use")
    assert page.text(".turn.assistant .who") == f"{pipeline.model}:support"
    page.run("document.getElementById('adapters').scrollIntoView({ block: 'center' })")
    page.picture(pictures / "page-adapters.png")
    assert not page.violations()
    page.find("#stop").click()
    page.until(lambda: page.text(".turn.assistant .note") == "Stopped.", "the end")
    page.find("#adapter-list li:first-child button").click()
    assert page.text("#model") == pipeline.model


def test_batches_are_shown_and_cancelled(page: Browser, pipeline: RealPipeline, pictures: Path) -> None:
    assert "None yet." in page.text("#batches")
    body = {"model": pipeline.model, "prompt": "a number", "max_tokens": LONG_TOKENS, "ignore_eos": True}
    lines = [json.dumps({"custom_id": f"{number}", "url": "/v1/completions", "body": body}) for number in range(400)]
    headers = {"Authorization": f"Bearer {pipeline.api_key}"}
    with httpx.Client(base_url=f"{pipeline.url}/v1", headers=headers, timeout=120) as client:
        file = client.post("/files", files={"file": ("input.jsonl", "\n".join(lines))}, data={"purpose": "batch"}).json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        client.post("/batches", json=asked).raise_for_status()
    page.until(lambda: "in progress: " in page.text("#batch-list") and "of 400 lines" in page.text("#batch-list"), "the batch")
    page.until(lambda: page.find("#batch-list progress").get_property("value") > 0, "its progress")
    page.run("document.getElementById('batches').scrollIntoView({ block: 'center' })")
    page.picture(pictures / "page-batch.png")
    assert not page.violations()
    page.find("#batch-list button").send_keys("\n")
    page.until(lambda: "cancelled: " in page.text("#batch-list"), "the end")
    assert not page.find("#batch-list button").is_displayed()
    page.run("document.getElementById('pipeline').scrollTop = 0")


def test_a_narrow_page_shows_chat_or_pipeline(page: Browser, pictures: Path) -> None:
    page.resize(*NARROW)
    try:
        assert not page.find("#pipeline").is_displayed()
        page.picture(pictures / "page-narrow.png")
        assert not page.violations()
        page.find("[data-view=pipeline]:not(html)").click()
        assert not page.find("#chat").is_displayed()
        page.prefer("dark")
        page.picture(pictures / "page-narrow-dark.png")
        assert not page.violations()
        assert page.run("return document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the window"
        page.find("[data-view=chat]:not(html)").click()
    finally:
        page.prefer("light")
        page.resize(*WIDE)


def test_an_error_is_shown_and_the_conversation_can_go_on(page: Browser, pictures: Path) -> None:
    clear_conversation(page)
    assert not page.console(), "the console is empty since the key was entered"
    page.run("document.getElementById('question').value = 'Tell me about the word. '.repeat(2000)")
    page.find("#send").click()
    page.until(lambda: "The question was refused" in page.text("[role=alert]"), "the error")
    assert page.run("return document.querySelector('[role=alert]').getBoundingClientRect().bottom < innerHeight")
    assert "context" in page.text("[role=alert]")
    page.picture(pictures / "page-error.png")
    assert not page.violations()
    assert all(" 4" in line for line in page.console()), "the console has the refusal only"
    clear_conversation(page)
    page.ask("What is the capital of Italy?")
    until_answered(page, 1)


def test_the_page_works_by_keyboard_and_remembers_the_theme(page: Browser) -> None:
    before = page.run("return getComputedStyle(document.body).backgroundColor")
    page.find("#theme").send_keys("\n")
    page.find("#theme").send_keys("\n")
    assert page.text("#theme") == "Theme: dark"
    assert page.run("return getComputedStyle(document.body).backgroundColor") != before
    page.driver.refresh()
    page.until(lambda: page.text("#link") == "live", "the stream, with the key that the tab has")
    assert page.text("#theme") == "Theme: dark"
    page.find("#question").send_keys("Tell me a long story about a lighthouse.\n")
    page.until(lambda: page.text(".turn.assistant .said"), "a beginning")
    page.find("#question").send_keys("\ue00c")  # Esc
    page.until(lambda: page.text(".turn.assistant .note") == "Stopped.", "the end")


def test_the_page_sent_requests_to_the_gateway_only(page: Browser, pipeline: RealPipeline) -> None:
    urls = page.requested()
    assert any(url.endswith("/v1/chat/completions") for url in urls)
    assert not [url for url in urls if not url.startswith((f"{pipeline.url}/", "data:"))]
    assert not [url for url in urls if str(pipeline.api_key) in url]
    assert not page.console()
