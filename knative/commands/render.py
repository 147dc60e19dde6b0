"""`python -m knative render`: the Kubernetes objects of a pipeline, on standard output or into a folder."""

from pathlib import Path

import click
import msgspec

from knative.commands.sources.store_access import StoreOptions, open_store, store_options
from knative.render.access import deployer_role as rendered_role
from knative.render.gitops import for_gitops, with_kustomization
from knative.render.rendering import render as render_files
from knative.render.rendering import resolve
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.spec.kubernetes_object import KubernetesObject, to_yaml
from knative.spec.model_shape import ModelShape, published_shape
from knative.spec.pipeline_spec import PipelineSpec
from knative.spec.spec_file import load_spec
from storage.models.model_repository import ModelManifest, read_manifest

image_option = click.option("--image", help="Instead of the spec's.")


@click.command()
@click.argument("spec", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", "-o", type=click.Path(file_okay=False, path_type=Path), help="Folder to write into, a file each.")
@click.option("--gitops", is_flag=True, help="For Argo CD or Flux: waves, what is not theirs to prune, a Job that prunes it.")
@click.option("--deployer-role", is_flag=True, help="Instead: the Role that whoever deploys it needs in its namespace.")
@image_option
@store_options
def render(spec: Path, output: Path | None, gitops: bool, deployer_role: bool, image: str | None, store: StoreOptions) -> None:
    """Render the pipeline that SPEC describes: a Knative Service for each stage, one for the gateway, and its Role.

    The store is asked for what the spec leaves open; one with `cut` and `model.digest` needs none. What Knative would
    refuse, or accept and surely not as meant, is not rendered.

    \b
    python -m knative render pipeline.yaml | kubectl apply -f -
    python -m knative render pipeline.yaml --output manifests/ && kubectl apply --kustomize manifests/
    python -m knative render pipeline.yaml --deployer-role | kubectl apply -f -
    """
    if deployer_role:
        click.echo(to_yaml([rendered_role(load_spec(spec).namespace)]), nl=False)
        return
    pipeline = resolved(read_spec(spec, image), store)
    files = for_gitops(pipeline, render_files(pipeline)) if gitops else render_files(pipeline)
    if output is None:
        click.echo("".join(to_yaml(objects) for objects in files.values()), nl=False)
        return
    output.mkdir(parents=True, exist_ok=True)
    for name, objects in with_kustomization(files).items():
        (output / name).write_text(to_yaml(objects), encoding="utf-8")
        click.echo(str(output / name))


def read_spec(path: Path, image: str | None) -> PipelineSpec:
    """Raises SpecError."""
    spec = load_spec(path)
    return spec if image is None else msgspec.structs.replace(spec, image=image)


def resolved(spec: PipelineSpec, store: StoreOptions) -> ResolvedPipeline:
    """Raises what `resolve` does."""
    return resolve(spec, lambda dtype: _published(spec, dtype, store))


def rendered_files(spec: PipelineSpec, store: StoreOptions) -> dict[str, list[KubernetesObject]]:
    """File name → objects, in the order in which they are applied. Raises what `resolve` does."""
    return render_files(resolved(spec, store))


def rendered_objects(spec: PipelineSpec, store: StoreOptions) -> list[KubernetesObject]:
    return [manifest for objects in rendered_files(spec, store).values() for manifest in objects]


def _published(spec: PipelineSpec, dtype: str, store: StoreOptions) -> tuple[ModelManifest, ModelShape]:
    with open_store(store) as opened:
        manifest = read_manifest(opened, spec.model.name, dtype)
        return manifest, published_shape(opened, manifest)
