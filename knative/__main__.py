"""`python -m knative`: the command line. A command's module is imported only when it is called, so that --help is quick."""

import importlib
from typing import Any, Final

import click

_COMMANDS: Final = {
    "run": "run",
    "ask": "ask",
    "batch": "batch",
    "plan": "plan",
    "push": "push",
    "push-adapter": "adapters",
    "adapters": "adapters",
    "families": "families",
    "render": "render",
    "preflight": "deploy",
    "deploy": "deploy",
    "promote": "deploy",
    "abort": "deploy",
    "rollback": "deploy",
    "rotate-token": "deploy",
    "kv": "kv",
    "keys": "keys",
    "list": "reports",
    "logs": "reports",
    "delete": "deploy",
    "check": "check",
    "status": "status",
    "requirements": "push",
    "cost": "reports",
    "kpa-replay": "check",
}
"""Name → module of knative.commands. The command is the module's attribute of that name, with `_` for `-`."""

_INTERRUPTED: Final = 130

_EPILOG: Final = """\b
Start here:
  python -m knative run                          a real model answers through three functions, then serves
  python -m knative ask http://127.0.0.1:8080 "What is the capital of France?"
  python -m knative status --watch               what runs, and why
On a cluster:
  python -m knative plan --model ./my-model --stages 4
  python -m knative push ./my-model --name my-model --dtype bfloat16
  python -m knative deploy pipeline.yaml
  python -m knative status pipeline.yaml

\b
Exit status: 0 done; 1 failed, the reason and what to do are on standard error; 2 wrong usage; 130 interrupted."""


class _Commands(click.Group):
    """Group of all commands.

    It imports a command's module when the command is used, and prints an expected failure as one line.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"knative.commands.{_COMMANDS[cmd_name]}")
        attribute = cmd_name.replace("-", "_")
        command: click.Command = getattr(module, attribute, None) or getattr(module, f"{attribute}_")  # such as `list_`
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise click.exceptions.Exit(_INTERRUPTED) from error
        except Exception as error:
            from knative.commands.failures import one_line

            text = one_line(error)
            if text is None:
                raise
            raise click.ClickException(text) from error


@click.group(cls=_Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Lamina serves a language model as a pipeline of Knative Services, cut by layers and scaled to zero."""


if __name__ == "__main__":
    main(prog_name="python -m knative")
