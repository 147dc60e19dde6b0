"""A scheduler over three stages, the middle one with several instances. The test plays the watch."""

from collections.abc import Iterator
from contextlib import contextmanager

from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.stages.routes import Endpoint, Placement
from tests.support.functions.gateway import check, scheduling, submit
from tests.support.functions.stage_server import StageServer, counting_stage, counting_stages


class Watched:
    """Three stages; `instances` are those of stage 1. `publish` does what the watch would do."""

    def __init__(self, stages: list[StageServer], scheduler: Scheduler, spare: list[StageServer]) -> None:
        self.stages = stages
        self.scheduler = scheduler
        self.instances = [stages[1], *spare]

    def publish(self, *of_middle: Endpoint) -> None:
        self.scheduler.endpoints_changed(1, of_middle)

    def publish_ready(self, *of_middle: StageServer) -> None:
        """Both ends are ready, and these instances of the middle stage."""
        for stage, ready in enumerate((self.stages[:1], of_middle, self.stages[2:])):
            self.scheduler.endpoints_changed(stage, [Endpoint(each.url) for each in ready])

    def run(self, number: int, max_tokens: int) -> list[TokenStream]:
        return [submit(self.scheduler, prompt(index), max_tokens) for index in range(number)]

    def check(self, streams: list[TokenStream], max_tokens: int) -> None:
        """Checks every token of the answers that `run` has begun."""
        check(streams, map(prompt, range(len(streams))), max_tokens)


def prompt(index: int) -> list[int]:
    return [index + 1] * (3 + index)


@contextmanager
def watched(spares: int = 1, **limits: float) -> Iterator[Watched]:
    with counting_stages() as stages:
        spare = [counting_stage(1) for _ in range(spares)]
        placed = Placement([stage.url for stage in stages], watched=True)
        try:
            with scheduling(stages, placement=placed, **limits) as scheduler:
                yield Watched(stages, scheduler, spare)
        finally:
            for stage in spare:
                stage.kill()
