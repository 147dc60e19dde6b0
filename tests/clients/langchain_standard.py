"""LangChain's standard tests of chat models, with `ChatOpenAI` against the pipeline at LAMINA_URL. test_langchain.py runs them
in the clients' environment.

Tests that must fail are listed below with the reason; all others must pass. LangChain itself skips features that the model does
not claim (images, sound, PDF, Anthropic's blocks) and the test of time with recorded replies (VCR).
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
        """Without the penalty, so small a model repeats itself without end."""
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
