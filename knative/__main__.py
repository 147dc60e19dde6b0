"""`python -m knative`: the command line. A command's module is imported only when it is called, so that --help is quick."""

import importlib
from typing import Any, Final

import click

_COMMANDS: Final = {
    "run": "knative.commands.run",
    "ask": "knative.commands.ask",
    "plan": "knative.commands.plan",
    "push": "knative.commands.push",
    "render": "knative.commands.render",
    "preflight": "knative.commands.preflight",
    "deploy": "knative.commands.deploy",
    "promote": "knative.commands.promote",
    "abort": "knative.commands.abort",
    "rollback": "knative.commands.rollback",
    "rotate-token": "knative.commands.rotate_token",
    "kv": "knative.commands.kv",
    "keys": "knative.commands.keys",
    "list": "knative.commands.list",
    "logs": "knative.commands.logs",
    "delete": "knative.commands.delete",
    "check": "knative.commands.check",
    "status": "knative.commands.status",
    "requirements": "knative.commands.requirements",
    "cost": "knative.commands.cost",
    "kpa-replay": "knative.commands.kpa_replay",
}
"""Name → module; the command is the module's attribute of the same name, `_` for `-`."""

_INTERRUPTED: Final = 130

_EPILOG: Final = """\b
Start here:
  python -m knative run                          a real model answers, through three functions, then serves
  python -m knative ask http://127.0.0.1:8080 "What is the capital of France?"
  python -m knative status --watch               what runs, and why
On a cluster:
  python -m knative plan --model ./my-model --stages 4
  python -m knative push ./my-model --name my-model --dtype bfloat16
  python -m knative deploy pipeline.yaml
  python -m knative status pipeline.yaml

\b
Status: 0 done; 1 failed, one line on standard error says why and what to do; 2 wrong usage; 130 interrupted."""


class _Commands(click.Group):
    """Knows the commands by name, and turns what they raise on purpose into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(_COMMANDS[cmd_name])
        attribute = cmd_name.replace("-", "_")
        command: click.Command = getattr(module, attribute, None) or getattr(module, f"{attribute}_")  # `list` is Python's
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise click.exceptions.Exit(_INTERRUPTED) from error
        except Exception as error:
            from knative.commands.terminal.failures import one_line

            text = one_line(error)
            if text is None:
                raise
            raise click.ClickException(text) from error


@click.group(cls=_Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Lamina serves a language model as a pipeline of Knative Services, cut by layers and scaled to zero."""


if __name__ == "__main__":
    main(prog_name="python -m knative")
