"""The official client against a gateway over three stages, each a process. The oracle is transformers."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from eventing.http.sse import SSEDecoder
from eventing.wire.generation import choice_seed
from tests.support.functions.functions import FunctionProcess, wait_until
from tests.support.storage.published import Published
from tests.support.storage.tiny_models import CONTEXT, greedy

TOLERANCE = 1e-3
EVENTS: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def client(gateway: FunctionProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def oracle(published: Published, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities after each token, [len(token_ids), vocab]."""
    with torch.inference_mode():
        return torch.log_softmax(published.model(torch.tensor([token_ids])).logits[0].float(), -1)


def chat_ids(published: Published, *turns: tuple[str, str]) -> list[int]:
    """The prompt of a conversation. turns: role and text."""
    prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns or [("user", "Hi")])
    ids: list[int] = published.tokenizer.encode(f"{prompt}<|im_start|>assistant\n", add_special_tokens=False).ids
    return ids


def continued(published: Published, ids: list[int], count: int = 8) -> str:
    """The whole model's continuation."""
    text: str = published.tokenizer.decode(published.expected(ids, count))
    return text


def asked(**fields: Any) -> Any:
    return {"model": "tiny", "temperature": 0, "max_tokens": 8} | fields


def hi(**fields: Any) -> Any:
    return asked(messages=[{"role": "user", "content": "Hi"}], **fields)


def test_a_chat_is_answered_whole_and_streamed(client: openai.OpenAI, published: Published) -> None:
    client.chat.completions.create(**hi())  # from here on the prompt is in the prefix cache
    completion = client.chat.completions.create(**hi())
    assert completion.choices[0].message.content == continued(published, chat_ids(published))
    assert completion.usage.prompt_tokens == len(chat_ids(published))
    chunks = list(client.chat.completions.create(**hi(stream=True, stream_options={"include_usage": True})))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == completion.choices[0].message.content
    assert chunks[-1].usage == completion.usage
    assert chunks[-2].choices[0].finish_reason == completion.choices[0].finish_reason


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "lamina"


def test_lists_of_prompts_are_answered_in_order(client: openai.OpenAI, published: Published) -> None:
    texts = ["hello", "The capital of France is", "12345"]
    ids = [published.tokenizer.encode(text).ids for text in texts]
    expected = [continued(published, each) for each in ids]
    for prompt in (texts, ids):
        completion = client.completions.create(**asked(prompt=prompt))
        assert [choice.index for choice in completion.choices] == [0, 1, 2]
        assert [choice.text for choice in completion.choices] == expected
        assert completion.usage.prompt_tokens == sum(map(len, ids))
    assert client.completions.create(**asked(prompt=ids[1])).choices[0].text == expected[1]
    streamed = ["", "", ""]
    for chunk in client.completions.create(**asked(prompt=texts, stream=True)):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == expected


def test_several_answers_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    fields = hi(n=4, temperature=1, seed=11)
    texts = [choice.message.content for choice in client.chat.completions.create(**fields).choices]
    assert len(set(texts)) > 1
    alone = [
        client.chat.completions.create(**(fields | {"n": 1, "seed": choice_seed(11, number)})).choices[0].message.content
        for number in range(4)
    ]
    assert texts == alone
    streamed, ended = [""] * 4, []
    for chunk in client.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            ended += [choice.index] if choice.finish_reason else []
    assert streamed == texts
    assert sorted(ended) == [0, 1, 2, 3]


def test_log_probabilities_of_an_answer_are_transformers(client: openai.OpenAI, published: Published) -> None:
    completion = client.chat.completions.create(**hi(logprobs=True, top_logprobs=3))
    choice = completion.choices[0]
    content = choice.logprobs.content or []
    prompt = chat_ids(published)
    drawn = published.expected(prompt, 8)
    truth = oracle(published, prompt + drawn)[len(prompt) - 1 :]
    assert len(content) == len(drawn)
    for token, row, one in zip(drawn, truth, content, strict=False):
        assert one.logprob == pytest.approx(row[token].item(), abs=TOLERANCE)
        assert one.token == published.tokenizer.decode([token], skip_special_tokens=False)
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=TOLERANCE)
    assert b"".join(bytes(one.bytes or []) for one in content).decode(errors="replace") == choice.message.content
    chunks = client.chat.completions.create(**hi(logprobs=True, top_logprobs=3, stream=True))
    streamed = [one for chunk in chunks for part in chunk.choices if part.logprobs for one in part.logprobs.content or []]
    assert streamed == content


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_an_echoed_prompt_has_transformers_log_likelihoods(
    client: openai.OpenAI, published: Published, max_tokens: int
) -> None:
    """A request of lm-eval: token ids, `echo`, and one top log-probability per token."""
    texts = ["The capital of France is Paris, as everybody knows.", "日本", "x" * 150]
    prompts = [published.tokenizer.encode(text).ids for text in texts]
    completion = client.completions.create(**asked(prompt=prompts, echo=True, logprobs=1, max_tokens=max_tokens))
    for prompt, choice in zip(prompts, completion.choices, strict=True):
        logprobs = choice.logprobs
        drawn = published.expected(prompt, max_tokens) if max_tokens else []
        ids = prompt + drawn
        truth = oracle(published, ids)
        wanted = [truth[place - 1][ids[place]].item() for place in range(1, len(ids))]
        assert logprobs.token_logprobs[0] is None
        assert logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=TOLERANCE)
        greatest = [max(top.values()) for top in logprobs.top_logprobs[1:]]
        assert greatest == pytest.approx(truth.max(-1).values[: len(ids) - 1].tolist(), abs=TOLERANCE)
        assert len(logprobs.tokens or []) == len(logprobs.text_offset or []) == len(ids)
        decoded = published.tokenizer.decode(prompt, skip_special_tokens=False)
        assert choice.text == decoded + published.tokenizer.decode(drawn)
    assert completion.usage.completion_tokens <= 3 * max_tokens


def test_an_echoed_prompt_streams_before_its_answer(client: openai.OpenAI) -> None:
    fields = asked(prompt="The capital of France is", echo=True, logprobs=2)
    whole = client.completions.create(**fields).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(**fields, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert whole.text.startswith("The capital of France is")
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": []}
    for chunk in chunks:
        for name in found:
            found[name] += getattr(chunk.logprobs, name, None) or []
    assert found == {name: getattr(whole.logprobs, name) for name in found}


def test_an_answer_without_max_tokens_may_fill_the_context(client: openai.OpenAI, published: Published) -> None:
    completion = client.completions.create(
        model="tiny", prompt="hello", temperature=0, extra_body={"ignore_eos": True}, timeout=120
    )
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.total_tokens == CONTEXT
    ids = published.tokenizer.encode("hello").ids
    assert completion.choices[0].text == published.tokenizer.decode(greedy(published.model, ids, CONTEXT - len(ids)))


def test_stop_tokens_and_strings_can_be_included_in_the_answer(client: openai.OpenAI, published: Published) -> None:
    prompt = published.tokenizer.encode("hello").ids
    drawn = published.expected(prompt, 8)
    stop = next(token for token in drawn[1:] if token not in drawn[:1])
    place = drawn.index(stop)
    for kept in (False, True):
        extra = {"stop_token_ids": [stop], "include_stop_str_in_output": kept}
        choice = client.completions.create(**asked(prompt="hello"), extra_body=extra).choices[0]
        assert choice.text == published.tokenizer.decode(drawn[: place + kept])
        assert choice.finish_reason == "stop"
    text = published.tokenizer.decode(drawn)
    character = next(one for one in text[1:] if one != text[0])
    for kept in (False, True):
        extra = {"include_stop_str_in_output": kept}
        choice = client.completions.create(**asked(prompt="hello", stop=character), extra_body=extra).choices[0]
        assert choice.text == text[: text.index(character) + kept]


def test_continuous_usage_comes_with_every_chunk(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.chat.completions.create(**hi(stream=True, stream_options=options)))
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts)
    assert chunks[-1].choices == []
    assert counts[-1] == counts[-2] > 0


def test_refusals_raise_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 2 * CONTEXT}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match="token 1000000 is outside of the vocabulary"):
        client.completions.create(**asked(prompt=[1000000]))
    with pytest.raises(openai.BadRequestError, match="`n` is 0"):
        client.chat.completions.create(**hi(n=0))
    with pytest.raises(openai.NotFoundError, match="'other'"):
        client.completions.create(model="other", prompt="hello")
    with pytest.raises(openai.NotFoundError, match="serves 'tiny'"):
        client.models.retrieve("gpt-4")


def test_the_asynchronous_client_may_leave_streams(gateway: FunctionProcess, published: Published) -> None:
    """Streams that it leaves free what they hold; the others are complete."""
    expected = continued(published, published.tokenizer.encode("hello").ids)

    async def stream(client: openai.AsyncOpenAI, leave: bool) -> str:
        fields = asked(prompt="hello", stream=True) | ({"max_tokens": CONTEXT // 2, "n": 2} if leave else {})
        text = ""
        async for chunk in await client.completions.create(**fields, extra_body={"ignore_eos": leave}):
            text += "".join(choice.text for choice in chunk.choices)
            if leave:
                break
        return text

    async def scenario() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream(client, leave=number % 3 == 0) for number in range(12)))

    texts = asyncio.run(scenario())
    assert [text for number, text in enumerate(texts) if number % 3] == [expected] * 8
    wait_until(lambda: "lamina_gateway_running_sequences 0.0" in gateway.get("/metrics")[1])


def response_to(input_: Any, **fields: Any) -> Any:
    """Arguments of /v1/responses."""
    return {"model": "tiny", "temperature": 0, "max_output_tokens": 8, "input": input_} | fields


def test_instructions_are_the_system_message(client: openai.OpenAI, published: Published) -> None:
    response = client.responses.create(**response_to("Hi", instructions="Be kind."))
    assert response.output_text == continued(published, chat_ids(published, ("system", "Be kind."), ("user", "Hi")))
    assert response.status in ("completed", "incomplete")
    assert (response.status == "incomplete") == (response.incomplete_details is not None)
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_output_items_can_be_sent_back_as_input(client: openai.OpenAI, published: Published) -> None:
    first = client.responses.create(**response_to("Hi"))
    items: Any = [{"role": "user", "content": "Hi"}, *(item.model_dump() for item in first.output)]
    items.append({"role": "user", "content": [{"type": "input_text", "text": "And"}, {"type": "input_text", "text": " now?"}]})
    second = client.responses.create(**response_to(items))
    said = ("user", "Hi"), ("assistant", first.output_text), ("user", "And now?")
    assert second.output_text == continued(published, chat_ids(published, *said))


def test_a_streams_events_build_the_response(client: openai.OpenAI) -> None:
    answer = client.responses.create(**response_to("Hi")).output_text
    stops = {"stop": answer[len(answer) // 2 :][:1]}
    whole = client.responses.create(**response_to("Hi"), extra_body=stops)
    with client.responses.stream(**response_to("Hi"), extra_body=stops) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert [event.sequence_number for event in events] == sorted(event.sequence_number for event in events)
    types = [event.type for event in events]
    assert types[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert types[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_documents_and_events_have_the_clients_types(gateway: FunctionProcess) -> None:
    include = ["message.output_text.logprobs"]
    fields = response_to("Hi", include=include, top_logprobs=2)
    document = httpx.post(f"{gateway.url}/v1/responses", json=fields).json()
    response = Response.model_validate(document, strict=True)
    part: Any = response.output[0]
    logprobs = part.content[0].logprobs
    assert b"".join(bytes(one.bytes) for one in logprobs).decode(errors="replace") == response.output_text
    streamed = httpx.post(f"{gateway.url}/v1/responses", json=fields | {"stream": True})
    events = [(event.event, json.loads(event.data)) for event in SSEDecoder().feed(streamed.content)]
    for name, event in events:
        assert EVENTS.validate_python(event).type == name
    assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
    (done,) = [event for name, event in events if name == "response.output_text.done"]
    assert done["logprobs"] == json.loads(json.dumps([one.model_dump() for one in logprobs]))


def test_an_answer_follows_its_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    text: Any = {"format": {"type": "json_schema", "name": "one", "schema": schema}}
    response = client.responses.create(**response_to("Hi", text=text, max_output_tokens=64))
    assert json.loads(response.output_text)["a"] in (1, 2)
    assert response.status == "completed"
