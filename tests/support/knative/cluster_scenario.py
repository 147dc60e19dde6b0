"""A pipeline on a real cluster, with its answers, Services and pods: shared by the steps of tests/pipeline/test_cluster.py."""

import base64
from pathlib import Path
from typing import Any, Final

import msgspec
from tokenizers import Tokenizer

from knative.cluster.client import Cluster
from knative.cluster.deployer import Deployer
from knative.cluster.garbage import GarbageCollector
from knative.cluster.status import services_of
from knative.render.gitops import for_gitops, with_kustomization
from knative.render.rendering import render, resolve
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.spec.kubernetes_object import KubernetesObject, to_yaml
from knative.spec.model_shape import ModelShape
from knative.spec.pipeline_spec import Autoscaling, ModelSpec, PipelineSpec, Resources, StageSpec, StoreSpec
from storage.models.model_repository import ModelManifest
from tests.support.knative.real_cluster import Conversations, Gateway, Settings, pods

NAME: Final = "lamina-test"
MODEL: Final = "lamina-test-smollm2"
INSTANCE: Final = f"app.kubernetes.io/instance={NAME}"
STAGES: Final = f"{INSTANCE},app.kubernetes.io/component=stage"
SERVICE: Final = "serving.knative.dev/service"
MAX_TOKENS: Final = 48
PROMPTS: Final = ("The capital of France is", "Once upon a time", "Water is made of", "A prime number is")


class Scenario:
    def __init__(self, where: Settings, publication: ModelManifest, shape: ModelShape, tokenizer: Tokenizer) -> None:
        self.where = where
        self.tokenizer = tokenizer
        self.said: list[str] = []
        self.cluster = Cluster.connect(where.kubeconfig, where.context)
        self.deployer = Deployer(self.cluster, where.namespace, self.said.append, timeout_seconds=900)
        self.garbage = GarbageCollector(self.cluster, where.namespace, self.said.append, timeout_seconds=900)
        self.expected: dict[str, str] = {}
        self._publication = publication
        self._shape = shape
        self._gateway: Gateway | None = None

    @property
    def gateway(self) -> Gateway:
        assert self._gateway is not None, "nothing was deployed: an earlier step failed"
        return self._gateway

    @property
    def conversations(self) -> Conversations:
        return Conversations(self.gateway, {prompt: self.expected[prompt] for prompt in PROMPTS}, MAX_TOKENS)

    @property
    def streams(self) -> Conversations:
        return Conversations(self.gateway, {prompt: self.expected[prompt] for prompt in PROMPTS}, MAX_TOKENS, streaming=True)

    def gateway_at(self, url: str) -> Gateway:
        return Gateway(url, self.where.ingress, MODEL)

    def spec(self, **changes: Any) -> PipelineSpec:
        spec = PipelineSpec(
            name=NAME,
            namespace=self.where.namespace,
            model=ModelSpec(name=MODEL, dtype="float32"),
            cut="0:10,10:20,20:30",
            image=self.where.image,
            stage=StageSpec(resources=Resources(cpu="1", memory="2Gi"), kv_cache="256Mi", autoscaling=Autoscaling(max_scale=3)),
            store=StoreSpec(endpoint=self.where.store_endpoint, bucket=self.where.store.bucket, region=self.where.store.region),
        )
        return msgspec.structs.replace(spec, **changes)

    def resolved(self, spec: PipelineSpec) -> ResolvedPipeline:
        return resolve(spec, lambda _: (self._publication, self._shape))

    def objects(self, spec: PipelineSpec) -> list[KubernetesObject]:
        return [each for rendered in render(self.resolved(spec)).values() for each in rendered]

    def write_folder(self, folder: Path, spec: PipelineSpec) -> ResolvedPipeline:
        """As `render --gitops --output` does, into an emptied folder."""
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        pipeline = self.resolved(spec)
        for name, objects in with_kustomization(for_gitops(pipeline, render(pipeline))).items():
            (folder / name).write_text(to_yaml(objects))
        return pipeline

    def deploy(self, **changes: Any) -> None:
        url = self.deployer.deploy(self.objects(self.spec(**changes)))
        self._gateway = self.gateway_at(url)

    def stage_pods(self) -> dict[str, int]:
        """Number of pods that are not terminating, by Service."""
        counts: dict[str, int] = {}
        for pod in pods(self.cluster, self.where, STAGES):
            service = pod["metadata"]["labels"][SERVICE]
            counts[service] = counts.get(service, 0) + 1
        return counts

    def stage_services(self, name: str = NAME) -> set[str]:
        names = {service["metadata"]["name"] for service in services_of(self.cluster, self.where.namespace, name)}
        return {name for name in names if name[:-1].endswith("-s")}


def store_secret(where: Settings) -> KubernetesObject:
    keys = {"AWS_ACCESS_KEY_ID": where.store.access_key_id, "AWS_SECRET_ACCESS_KEY": where.store.secret_access_key}
    data = {name: base64.b64encode(value.encode()).decode() for name, value in keys.items()}
    metadata = {"name": "lamina-store", "namespace": where.namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": data}
