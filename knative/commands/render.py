"""`python -m knative render`: the Kubernetes objects of a pipeline, on standard output or into a folder."""

import dataclasses
from pathlib import Path

import click
import msgspec

from knative.commands.options import FILE, OpenStore, image_option, store_options
from knative.render import access
from knative.render.fleet import door_files, fleet_door, member_files
from knative.render.gitops import for_gitops, with_kustomization
from knative.render.rendering import render as render_files
from knative.render.rendering import resolve
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.spec.errors import SpecError
from knative.spec.fleet_spec import FleetSpec, is_fleet, load_fleet
from knative.spec.kubernetes_object import KubernetesObject, to_yaml
from knative.spec.model_shape import ModelShape, published_shape
from knative.spec.pipeline_spec import PipelineSpec
from knative.spec.spec_file import load_spec
from storage.models.model_repository import ModelManifest, read_manifest


@click.command(short_help="Render the Kubernetes objects of a pipeline.")
@click.argument("spec", type=FILE)
@click.option("--output", "-o", type=click.Path(file_okay=False, path_type=Path), help="Folder to write the files into.")
@click.option("--gitops", is_flag=True, help="Add what Argo CD or Flux need: sync waves, prune protection, a pruning Job.")
@click.option("--deployer-role", is_flag=True, help="Render instead the Role that deploying needs in the namespace.")
@image_option
@store_options
def render(
    spec: Path, output: Path | None, gitops: bool, deployer_role: bool, image: str | None, open_store: OpenStore
) -> None:
    """Render the pipeline that SPEC describes: a Knative Service for each stage, one for the gateway, and its Role.

    SPEC may be a Fleet: then one gateway, and for each member its stages and a ConfigMap.

    Reads digests and cut from the store unless the spec has `cut` and `model.digest`. Fails for manifests that Knative would
    reject, and for mistakes that Knative would accept.

    \b
    python -m knative render pipeline.yaml | kubectl apply -f -
    python -m knative render pipeline.yaml --output manifests/ && kubectl apply --kustomize manifests/
    python -m knative render pipeline.yaml --deployer-role | kubectl apply -f -
    """
    if deployer_role:
        namespace = load_fleet(spec)[0].namespace if is_fleet(spec) else load_spec(spec).namespace
        click.echo(to_yaml([access.deployer_role(namespace)]), nl=False)
        return
    if is_fleet(spec):
        fleet, members = fleet_objects(spec, open_store, image)
        files = {**door_files(fleet), **{name: each for found in members.values() for name, each in found.items()}}
        files = for_gitops(fleet_door(fleet), files) if gitops else files
    else:
        pipeline = resolved(read_spec(spec, image), open_store)
        files = for_gitops(pipeline, render_files(pipeline)) if gitops else render_files(pipeline)
    if output is None:
        click.echo("".join(to_yaml(objects) for objects in files.values()), nl=False)
        return
    output.mkdir(parents=True, exist_ok=True)
    for name, objects in with_kustomization(files).items():
        (output / name).write_text(to_yaml(objects), encoding="utf-8")
        click.echo(str(output / name))


def read_spec(path: Path, image: str | None) -> PipelineSpec:
    """Reads a spec, and replaces its image unless `image` is None. Raises SpecError."""
    spec = load_spec(path)
    return spec if image is None else msgspec.structs.replace(spec, image=image)


def resolved(spec: PipelineSpec, open_store: OpenStore) -> ResolvedPipeline:
    """The spec with its cut and digests. The store is opened only if the spec does not pin them.

    Raises what `resolve` raises.
    """

    def published(dtype: str) -> tuple[ModelManifest, ModelShape]:
        with open_store() as opened:
            manifest = read_manifest(opened, spec.model.name, dtype)
            return manifest, published_shape(opened, manifest)

    return resolve(spec, published)


def rendered_objects(spec: PipelineSpec, open_store: OpenStore) -> list[KubernetesObject]:
    """All objects of the spec's pipeline, in the order in which they are applied. Raises what `resolve` raises.

    open_store: called only if the spec does not pin cut and digests.
    """
    return [manifest for objects in render_files(resolved(spec, open_store)).values() for manifest in objects]


def fleet_objects(
    path: Path, open_store: OpenStore, image: str | None = None, only: str | None = None
) -> tuple[FleetSpec, dict[str, dict[str, list[KubernetesObject]]]]:
    """The fleet, and for each member its files. only: the one member that is wanted."""
    fleet, specs = load_fleet(path)
    if image is not None:
        fleet = msgspec.structs.replace(fleet, image=image)
        specs = [msgspec.structs.replace(each, image=image) for each in specs]
    if only is not None and only not in {each.name for each in specs}:
        raise SpecError(f"{path}: has no member {only}; it has {', '.join(sorted(each.name for each in specs))}")
    return fleet, {
        spec.name: member_files(dataclasses.replace(resolved(spec, open_store), fleet=fleet.name))
        for spec in specs
        if only in (None, spec.name)
    }
