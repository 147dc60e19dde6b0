"""Options that several commands share: which cluster, pipeline and store a command works on."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from knative.commands.state_folder import DEFAULT_FOLDER, find_running
from knative.spec.fleet_spec import is_fleet, load_fleet
from knative.spec.spec_file import load_spec
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings

if TYPE_CHECKING:
    from knative.cluster.client import Cluster

OpenStore = Callable[[], AbstractContextManager[ObjectStore]]  # raises a StorageError, or click.UsageError if keys are missing

STORE_FOLDER: Final = "store"  # of the embedded store, in the state folder

FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER: Final = click.Path(exists=True, file_okay=False, path_type=Path)

force_option = click.option("--force-conflicts", is_flag=True, help="Take over fields that another field manager has set.")
timeout_option = click.option(
    "--timeout", type=click.FloatRange(min=1), default=900, show_default=True, help="Seconds to wait for each step."
)
image_option = click.option("--image", help="Image to use instead of the spec's.")
tokenizer_option = click.option(
    "--tokenizer",
    type=FOLDER,
    help="Folder with tokenizer.json, and chat_template.jinja, to publish instead of the model's own.",
)
state_option = click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_FOLDER,
    show_default=True,
    help="Folder of the run on this machine: embedded store, logs, lock.",
)


def say(line: str) -> None:
    """Prints a line of progress to standard error, because standard output has only the result."""
    click.echo(line, err=True)


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds --kubeconfig and --context. The command gets `connect`, and calls it when it needs the cluster."""

    @click.option("--kubeconfig", envvar="KUBECONFIG", show_envvar=True, help="File with clusters and credentials.")
    @click.option("--context", help="Context of the kubeconfig; its current one by default.")
    @functools.wraps(command)
    def with_cluster(*args: Any, kubeconfig: str | None, context: str | None, **kwargs: Any) -> Any:
        def connect() -> "Cluster":
            from knative.cluster.client import Cluster  # the kubernetes client takes a third of a second to import

            return Cluster.connect(kubeconfig, context)

        return command(*args, connect=connect, **kwargs)

    return with_cluster


def pipeline_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds PIPELINE and --namespace.

    The command gets `name` and `namespace`; None stands for the namespace of the kubeconfig's context.
    """

    @click.argument("pipeline")
    @click.option("--namespace", "-n", help="Namespace of the pipeline. Default: the spec's, or the context's own.")
    @functools.wraps(command)
    def with_pipeline(*args: Any, pipeline: str, namespace: str | None, **kwargs: Any) -> Any:
        name, namespace = named_pipeline(pipeline, namespace)
        return command(*args, name=name, namespace=namespace, **kwargs)

    return with_pipeline


def named_pipeline(pipeline: str, namespace: str | None) -> tuple[str, str | None]:
    """Name and namespace of a pipeline. Raises SpecError.

    pipeline: its name, or the file of its spec. namespace: from the option; None: that of the spec, or None without one.
    """
    if not pipeline.endswith((".yaml", ".yml")):
        return pipeline, namespace
    spec = load_fleet(Path(pipeline))[0] if is_fleet(Path(pipeline)) else load_spec(Path(pipeline))
    return spec.name, namespace or spec.namespace


def store_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds the options of the store. The command gets `open_store`, and calls it when it needs the store."""

    @click.option("--store-endpoint", envvar="LAMINA_STORE_ENDPOINT", show_envvar=True, help="S3-compatible store.")
    @click.option("--store-bucket", envvar="LAMINA_STORE_BUCKET", show_envvar=True, default="lamina", show_default=True)
    @click.option("--store-region", envvar="LAMINA_STORE_REGION", show_envvar=True, default="us-east-1", show_default=True)
    @state_option
    @functools.wraps(command)
    def with_store(
        *args: Any, store_endpoint: str | None, store_bucket: str, store_region: str, state: Path, **kwargs: Any
    ) -> Any:
        def open_store() -> AbstractContextManager[ObjectStore]:
            if store_endpoint is None:
                return _store_of_this_machine(state)
            return nullcontext(ObjectStore(_store_settings(store_endpoint, store_bucket, store_region)))

        return command(*args, open_store=open_store, **kwargs)

    return with_store


@contextmanager
def _store_of_this_machine(state: Path) -> Iterator[ObjectStore]:
    """Opens the store of the pipeline that runs on this machine or, if none runs, the embedded store of the state folder.

    Raises a StorageError.
    """
    running = find_running(state)
    if running is not None and running.store is not None:
        yield ObjectStore(running.store)
        return
    with EmbeddedStore(state / STORE_FOLDER) as store:
        yield ObjectStore(store.settings)


def _store_settings(endpoint: str, bucket: str, region: str) -> StoreSettings:
    """Settings of a store, with keys from the environment. Raises click.UsageError if they are missing."""
    access_key_id, secret_access_key = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if not access_key_id or not secret_access_key:
        raise click.UsageError(
            f"the store at {endpoint} needs keys: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
        )
    try:
        return StoreSettings(
            endpoint_url=endpoint,
            bucket=bucket,
            region=region,
            access_key_id=access_key_id,
            secret_access_key=secret_access_key,
            session_token=os.environ.get("AWS_SESSION_TOKEN"),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
