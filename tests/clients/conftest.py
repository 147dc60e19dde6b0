"""A pipeline of processes, the clients' environment, and the tokenizer as a folder: nothing is downloaded."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.storage.published import CHAT_TEMPLATE, Published

CLIENTS = Path(os.environ.get("LAMINA_TEST_CLIENTS", ROOT / ".venv-clients")) / "bin"
_SECONDS = 200.0
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def needs(command: str) -> pytest.MarkDecorator:
    """Skips tests of a client whose command is not installed, before anything is started for them."""
    reason = f"{command} is not in {CLIENTS.parent}: make test-clients installs it"
    return pytest.mark.skipif(not (CLIENTS / command).exists(), reason=reason)


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_client(tmp_path: Path) -> Run:
    """Runs a command of the clients' environment to its end, with its own home. If the command fails, so does the test."""

    def run(command: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        home = {"HOME": str(tmp_path), "PATH": f"{CLIENTS}:{os.environ['PATH']}", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [str(CLIENTS / command), *arguments],
            env=home | _OFFLINE | environ,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{command} {arguments}: {done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done

    return run


@pytest.fixture
def tokenizer_folder(published: Published, tmp_path: Path) -> Path:
    """The tokenizer as files that transformers reads."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "tokenizer"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=published.tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
