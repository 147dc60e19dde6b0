"""LangChain's own standard tests of chat models, with `ChatOpenAI` against a pipeline. Run in the clients' environment, by
test_langchain.py; LAMINA_URL says where it is.

What must fail is named below with its reason; all else must pass. LangChain itself leaves out what the model is not said to
take: images, sound, PDF and Anthropic's blocks; and the test of time by recorded replies (VCR).
"""

import os

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestLamina(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, object]:
        """The penalty is for answers to end: without it, greedy, so small a model says the same again and again."""
        return {
            "model": "smollm2",
            "base_url": os.environ["LAMINA_URL"] + "/v1",
            "api_key": "none",
            "temperature": 0,
            "frequency_penalty": 1,
            "max_tokens": 200,
            "timeout": 60,
            "stream_usage": True,
            "model_kwargs": {"parallel_tool_calls": False},
        }

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "smollm2"

    @pytest.mark.xfail(reason="JSON mode says nothing of fields, and a model of 135 million parameters leaves one out")
    def test_json_mode(self, model: BaseChatModel) -> None:
        super().test_json_mode(model)

    @pytest.mark.xfail(reason="the model is free to call the tool, and one of 135 million parameters does not")
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)
