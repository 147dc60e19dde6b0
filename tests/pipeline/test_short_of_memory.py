"""A pipeline whose pods are full of long answers gets more of them while others wait for memory, however idle it is."""

import asyncio
from pathlib import Path

from knative.commands.ask import Question, stream_answer
from knative.commands.local_pipeline import local_pipeline
from knative.render.services import services
from knative.spec.pipeline_spec import Autoscaling, GatewaySpec, ModelSpec, PipelineSpec, StageSpec, StoreSpec
from storage.store.object_store import ObjectStore
from tests.support.knative.cold_pipeline import deployed, pods_of, set_environment
from tests.support.knative.platform import until
from tests.support.storage.published import Published

STAGES, MAX_SCALE = 2, 3
FIT = 4  # sequences in the memory of one pod: half of a micro-batch
PASS_SECONDS = 0.3  # of each stage, so that an answer takes longer than the stages have to grow
TOKENS = 220
# Keys and values of three layers with two heads of eight numbers in 16 bits, as stages that sleep count them.
KV_BYTES = FIT * (TOKENS + 20) * 2 * 3 * 2 * 8 * 2
DEADLINE_SECONDS = 120.0


async def _converse(url: str, number: int) -> None:
    async for _ in stream_answer(url, Question(f"number {number:02d}", TOKENS, chat=False)):
        pass


async def _grows(published: Published, folder: Path) -> None:
    spec = PipelineSpec(
        name="full",
        model=ModelSpec(name="tiny", dtype="float32"),
        stages=STAGES,
        image="lamina:local",
        stage=StageSpec(layer_group="sleep", sleep_seconds=PASS_SECONDS, autoscaling=Autoscaling(max_scale=MAX_SCALE)),
        gateway=GatewaySpec(micro_batch_sequences=2 * FIT, draft_tokens=0),
        store=StoreSpec(endpoint="http://127.0.0.1"),
    )
    local = local_pipeline(ObjectStore(published.store), published.manifest, STAGES, spec, {})
    names = [local.pipeline.stage_name(index) for index in range(STAGES)]
    manifests = services(local.pipeline)
    for manifest in manifests[:STAGES]:
        set_environment(manifest, {"LAMINA_KV_CACHE_BYTES": str(KV_BYTES)})
    async with deployed(local, manifests, folder) as platform:
        url = platform.url(spec.name)
        answers = [asyncio.create_task(_converse(url, number)) for number in range(FIT * MAX_SCALE)]
        try:
            await until(lambda: all(len(pods_of(platform, name)) == MAX_SCALE for name in names), DEADLINE_SECONDS)
            assert not any(answer.done() for answer in answers), "stages grew because sequences waited, not because some ended"
        finally:
            for answer in answers:
                answer.cancel()
            await asyncio.gather(*answers, return_exceptions=True)


def test_stages_grow_while_sequences_wait_for_memory(published: Published, tmp_path: Path) -> None:
    asyncio.run(_grows(published, tmp_path))
