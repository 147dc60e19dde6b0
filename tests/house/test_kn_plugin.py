"""`kn lamina …`: kn runs `kn-lamina` of its folder of plugins or of the PATH, with what stands behind the name."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder on the PATH with a link to the plugin, and one to work in where something is in the way."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kn-lamina").symlink_to(ROOT / "kn-lamina")
    (tmp_path / "work" / "knative").mkdir(parents=True)
    (tmp_path / "work" / "knative" / "__init__.py").write_text("raise SystemExit('the wrong module')\n")
    return tmp_path


def run(elsewhere: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{elsewhere / 'bin'}:/usr/local/bin:/usr/bin:/bin"
    environ = {"PATH": path, "HOME": str(elsewhere)}
    work = elsewhere / "work"
    return subprocess.run(
        [program, *arguments], cwd=work, env=environ, capture_output=True, text=True, timeout=240, check=False
    )


def test_a_link_on_the_path_is_the_command_line(elsewhere: Path) -> None:
    result = run(elsewhere, str(elsewhere / "bin" / "kn-lamina"), "--help")
    assert result.returncode == 0, result.stderr
    assert "deploy" in result.stdout


@pytest.mark.parametrize("config", [".config", "elsewhere"], ids=["XDG_CONFIG_HOME unset", "XDG_CONFIG_HOME"])
def test_make_kn_plugin_installs_it_and_its_help_is_that_of_the_module(elsewhere: Path, config: str) -> None:
    """kn looks in plugins/ of its configuration, without an entry in the PATH."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(elsewhere)}
    if config == "elsewhere":
        environ["XDG_CONFIG_HOME"] = str(elsewhere / config)
    command = ["make", "--no-print-directory", "-o", ".venv/run.stamp", "kn-plugin"]
    for _ in range(2):  # again, after a move of the folder
        subprocess.run(command, cwd=ROOT, env=environ, check=True, capture_output=True, timeout=60)
    plugin = elsewhere / config / "kn" / "plugins" / "kn-lamina"
    command = [str(ROOT / ".venv" / "bin" / "python"), "-m", "knative", "deploy", "--help"]
    own = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True)
    result = run(elsewhere, str(plugin), "deploy", "--help")
    assert (result.returncode, result.stdout, result.stderr) == (0, own.stdout, own.stderr)


def test_files_are_those_of_the_folder_one_works_in_and_the_status_is_passed_on(elsewhere: Path) -> None:
    (elsewhere / "work" / "service.yaml").write_text("apiVersion: serving.knative.dev/v1\nkind: Service\n")
    result = run(elsewhere, str(elsewhere / "bin" / "kn-lamina"), "check", "service.yaml")
    assert result.returncode == 1
    assert result.stdout.startswith("service.yaml: refused: ")


def test_without_a_virtual_environment_it_says_what_to_do(elsewhere: Path) -> None:
    lonely = elsewhere / "lonely"
    shutil.copy(ROOT / "kn-lamina", lonely)
    result = run(elsewhere, str(lonely))
    assert result.returncode == 1
    assert "make setup" in result.stderr


@pytest.mark.skipif(shutil.which("kn") is None, reason="needs kn, which no package index of Python or Debian has")
def test_kn_finds_it(elsewhere: Path) -> None:
    assert "deploy" in run(elsewhere, "kn", "lamina", "--help").stdout
