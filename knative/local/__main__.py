"""`python -m knative.local`: runs Knative Services on this machine until Ctrl-C."""

import asyncio
import logging
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from knative.local.autoscaler.revision_settings import SettingsError
from knative.local.errors import LocalError
from knative.local.kubelet.containers import data_folders, read_data_folder
from knative.local.platform import Platform, PlatformOptions, running_platform
from knative.webhook.check import is_knative_service

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_STATUS_SECONDS = 0.5


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--port", "ports", multiple=True, metavar="SERVICE=PORT", help="Port of a Service's URL; default: any free one.")
@click.option("--secrets", type=_FOLDER, help="Secrets: a folder for each, with a file for each key.")
@click.option("--config-maps", type=_FOLDER, help="ConfigMaps, likewise.")
@click.option("--logs", type=click.Path(file_okay=False, path_type=Path), help="Folder for the pods' logs; default: temporary.")
def main(
    files: Sequence[Path], ports: Sequence[str], secrets: Path | None, config_maps: Path | None, logs: Path | None
) -> None:
    """Run the Knative Services, Brokers, Triggers and Sequences of the YAML FILES on this machine until Ctrl-C.

    Images are not pulled: every container must name its command, which runs in the current folder with Knative's environment
    (PORT, K_SERVICE …). Each Service starts at zero. A request starts a pod.

    \b
    python -m knative.local service.yaml
    python -m knative.local service.yaml --port hello=8080
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    with tempfile.TemporaryDirectory(prefix="knative-local-") as temporary:
        (logs or Path(temporary)).mkdir(parents=True, exist_ok=True)
        try:
            options = PlatformOptions(
                ports=dict(map(_port, ports)),
                secrets=read_data_folder(secrets),
                secret_folders=data_folders(secrets),
                config_maps=read_data_folder(config_maps),
                logs=(logs or Path(temporary)).resolve(),
                folder=Path.cwd(),
                entrypoint=(),
            )
            asyncio.run(_serve(_read(files), options))
        except (LocalError, SettingsError, OSError, yaml.YAMLError) as error:
            raise click.ClickException(str(error)) from error


def _port(text: str) -> tuple[str, int]:
    name, _, port = text.partition("=")
    if not name or not port.isdecimal() or int(port) > 65535:
        raise click.BadParameter(f"{text!r} is not SERVICE=PORT, such as hello=8080", param_hint="--port")
    return name, int(port)


def _read(files: Sequence[Path]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for file in files:
        for document in filter(None, yaml.safe_load_all(file.read_text(encoding="utf-8"))):
            if not isinstance(document, dict):
                raise click.ClickException(f"{file}: a manifest is an object, not {type(document).__name__}")
            found += document["items"] if document.get("kind") == "List" else [document]
    if not any(map(is_knative_service, found)):
        raise click.ClickException(f"{', '.join(map(str, files))}: no Knative Service (serving.knative.dev) in it")
    return found


async def _serve(manifests: Sequence[dict[str, Any]], options: PlatformOptions) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with running_platform(options, manifests) as platform:
        for service in platform.services.values():
            click.echo(f"{service.name}: {service.server.url}")
        for broker in platform.eventing.status().get("brokers", ()):
            click.echo(f"broker: {broker['url']}")
        click.echo(f"status: {platform.admin_url}/status, process {os.getpid()}; serving until Ctrl-C")
        watch = asyncio.create_task(_print_changes(platform))
        await stop.wait()
        watch.cancel()


async def _print_changes(platform: Platform) -> None:
    """Prints a line when the number of a revision's pods changes, and when a revision fails."""
    shown: dict[str, str] = {}
    while True:
        for service in platform.services.values():
            for revision in service.revisions:
                name = revision.name.revision
                text = revision.failure or f"{len(revision.ready_pods)} of {len(revision.staying_pods)} pods ready"
                if text != shown.get(name, "0 of 0 pods ready"):
                    click.echo(f"{name}: {text}")
                shown[name] = text
        await asyncio.sleep(_STATUS_SECONDS)


if __name__ == "__main__":
    main(prog_name="python -m knative.local")
