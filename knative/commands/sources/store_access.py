"""Which store a command works on: the one that is named, that of the pipeline running here, or the embedded one."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from knative.commands.sources.state_folder import DEFAULT_FOLDER, find_running
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings

STORE_FOLDER: Final = "store"
"""Of the embedded store, inside the state folder."""


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What the options of a command say. Without an endpoint the store is on this machine."""

    endpoint: str | None
    bucket: str
    region: str
    access_key_id: str | None
    secret_access_key: str | None
    session_token: str | None
    state: Path


def store_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; the command gets them as one argument `store`."""

    @click.option("--store-endpoint", envvar="LAMINA_STORE_ENDPOINT", show_envvar=True, help="S3-compatible store.")
    @click.option("--store-bucket", envvar="LAMINA_STORE_BUCKET", show_envvar=True, default="lamina", show_default=True)
    @click.option("--store-region", envvar="LAMINA_STORE_REGION", show_envvar=True, default="us-east-1", show_default=True)
    @state_option
    @functools.wraps(command)
    def with_store(
        *args: Any, store_endpoint: str | None, store_bucket: str, store_region: str, state: Path, **kwargs: Any
    ) -> Any:
        options = StoreOptions(
            endpoint=store_endpoint,
            bucket=store_bucket,
            region=store_region,
            access_key_id=os.environ.get("AWS_ACCESS_KEY_ID"),
            secret_access_key=os.environ.get("AWS_SECRET_ACCESS_KEY"),
            session_token=os.environ.get("AWS_SESSION_TOKEN"),
            state=state,
        )
        return command(*args, store=options, **kwargs)

    return with_store


state_option = click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_FOLDER,
    show_default=True,
    help="Folder of the run on this machine: embedded store, logs, lock.",
)


@contextmanager
def open_store(options: StoreOptions) -> Iterator[ObjectStore]:
    """Raises a StorageError, or click.UsageError where keys are missing."""
    if options.endpoint is not None:
        yield ObjectStore(_named(options, options.endpoint))
        return
    running = find_running(options.state)
    if running is not None and running.store is not None:
        yield ObjectStore(running.store)
        return
    with EmbeddedStore(options.state / STORE_FOLDER) as store:
        yield ObjectStore(store.settings)


def _named(options: StoreOptions, endpoint: str) -> StoreSettings:
    if not options.access_key_id or not options.secret_access_key:
        raise click.UsageError(
            f"the store at {endpoint} wants keys: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
        )
    try:
        return StoreSettings(
            endpoint_url=endpoint,
            bucket=options.bucket,
            region=options.region,
            access_key_id=options.access_key_id,
            secret_access_key=options.secret_access_key,
            session_token=options.session_token,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
