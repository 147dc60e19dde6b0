"""Answers the lines of open batches, beside this gateway's live requests and together with other gateways."""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Final, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from eventing.http.delivery import BadReply, DeliveryError
from eventing.problems import Problem, RateLimited
from functions.gateway.answers.generation import ClientLeft, Generation
from functions.gateway.jobs.allowance import TICK_SECONDS, Allowance
from functions.gateway.jobs.batches import Batches, BatchJob, EndStatus
from functions.gateway.jobs.files import part_name
from functions.gateway.jobs.hold import Hold
from functions.gateway.jobs.lines import LineAnswerer, LineDelayed, LinePlace
from functions.gateway.jobs.results import LineResult, PartResults
from functions.gateway.jobs.run import END, LEASE_SECONDS, BatchRun
from functions.threads.pool import ThreadPool
from storage.errors import StorageError

_log: Final = logging.getLogger(__name__)

MAX_LINES: Final = 64  # that are answered at the same time
MAX_PARTS: Final = 6  # in memory at the same time: more lines than MAX_LINES, so that the end of a part leaves no gap
LOOK_SECONDS: Final = 1.0  # between looks into the store while a batch is open
IDLE_LOOK_SECONDS: Final = 5.0  # while none is
_CHECKPOINT_SECONDS: Final = 2.0  # between writes of what is answered of a part
_CREATING_SECONDS: Final = 600.0  # far more than between the two writes that create a batch
_MAX_ERRORS: Final = 3  # tries of a line that fails inside; then its error is its answer
_EXPIRY_SECONDS: Final = 60.0  # between looks for files and batches whose time is over
_PAUSE_SECONDS: Final = 10.0  # of a batch, after a failure of the store, or while its client has used up its budget
_LONGEST_BACK_OFF_SECONDS: Final = 30.0


class BatchMetrics:
    """Metrics of batches. No label names a client, a file or a batch."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        self.open = gauge("lamina_gateway_open_batches", "Batches that have not ended")
        self.oldest_seconds = gauge("lamina_gateway_oldest_batch_seconds", "Age of the oldest batch that has not ended")
        self.ended = counter("lamina_gateway_batches", "Batches that this gateway ended", ["status"])
        self._lines = counter("lamina_gateway_batch_lines", "Lines of batches, by outcome", ["outcome"])
        self._tokens = counter("lamina_gateway_batch_tokens", "Tokens of lines of batches", ["kind"])
        for status in get_args(EndStatus):  # exported as 0 from the start, or a rate would miss the first event of its kind
            self.ended.labels(status)
        for outcome in ("answered", "failed", "given_up"):
            self._lines.labels(outcome)
        for kind in ("input", "output"):
            self._tokens.labels(kind)

    def line(self, outcome: str, result: LineResult | None) -> None:
        """Counts a line that this gateway answered or gave up.

        If the line was given up, `result` is None.
        """
        self._lines.labels(outcome).inc()
        if result is not None:
            self._tokens.labels("input").inc(result.input_tokens)
            self._tokens.labels("output").inc(result.output_tokens)


@dataclass(eq=False)
class BatchWorker:
    """Looks for open batches and answers their lines, until `stop` is called.

    Results go to the store every _CHECKPOINT_SECONDS, so a gateway that dies loses little work, and no line.
    """

    _batches: Batches
    _answerer: LineAnswerer
    _waiting: Callable[[], int]  # number of all sequences that the scheduler has not begun
    # Called with each batch that has ended. If it raises or returns False the batch stays open, to be told later.
    _tell: Callable[[BatchJob], bool]
    _hold: Hold
    _metrics: BatchMetrics

    def __post_init__(self) -> None:
        self._metrics.open.set_function(lambda: len(self.runs))
        self._metrics.oldest_seconds.set_function(
            lambda: max((time.time() - run.job.created_at for run in list(self.runs.values())), default=0.0)
        )
        self._allowance = Allowance(MAX_LINES, self._waiting)
        self.runs: dict[tuple[str, str], BatchRun] = {}  # of open batches, by owner and id
        self._in_hand = 0  # parts
        self._lock = threading.Lock()  # guards runs' parts, and `_in_hand`
        self.woken = threading.Event()  # if set, the worker looks at once, because a batch was created or cancelled
        self._stopping = threading.Event()
        self._parts = ThreadPool(MAX_PARTS + 1, "batch-part")
        self._lines = ThreadPool(MAX_LINES, "batch-line")
        self._looks = threading.Thread(target=self._look_for_ever, name="batches", daemon=True)

    def start(self) -> None:
        self._looks.start()
        threading.Thread(target=self._hold.keep, args=(lambda: bool(self.runs),), name="batches-hold", daemon=True).start()

    def stop(self) -> None:
        """Gives up the lines that are being answered, so that other gateways answer them. Does not wait."""
        self._stopping.set()
        self._hold.over.set()
        self.woken.set()

    def join(self, seconds: float) -> None:
        """Waits until the answers so far are stored, at most `seconds`. Call it after `stop`."""
        deadline = time.monotonic() + seconds
        while self._in_hand and time.monotonic() < deadline:
            time.sleep(0.02)

    def _look_for_ever(self) -> None:
        looked_at = ticked_at = 0.0
        expired_at = -math.inf
        while not self._stopping.is_set():
            try:
                if time.monotonic() - looked_at >= LOOK_SECONDS:
                    self._look()
                    looked_at = time.monotonic()
                self._take_parts()
                if time.monotonic() - expired_at >= _EXPIRY_SECONDS:
                    expired_at = time.monotonic()
                    self._parts.submit(self._expire)
            except StorageError as error:
                _log.warning("batches wait for their store: %s", error)
            except Exception:  # noqa: BLE001 - logged; the batches go on
                _log.exception("looking for batches failed")
            if self._in_hand and time.monotonic() - ticked_at >= TICK_SECONDS:
                ticked_at = time.monotonic()
                self._allowance.tick(MAX_LINES // 8 if any(run.due() for run in self.runs.values()) else 0)
            self.woken.wait(TICK_SECONDS if self._in_hand else LOOK_SECONDS if self.runs else IDLE_LOOK_SECONDS)
            self.woken.clear()

    def _look(self) -> None:
        """Reads from the store which batches are open, and how far they are."""
        open_ = set()
        for place, opened in self._batches.open():
            open_.add(place)
            if place in self.runs:
                continue
            job = self._batches.find(*place)
            if job is not None:
                self.runs[place] = BatchRun(self._batches, job)
            elif (datetime.now(UTC) - opened).total_seconds() > _CREATING_SECONDS:  # the gateway died that created it
                self._batches.close(*place)
        for place, run in list(self.runs.items()):
            if place not in open_:
                del self.runs[place]
                run.closed = True
                continue
            if run.ending:  # the thread that ends it counts its parts
                continue
            try:
                with self._lock:
                    run.look()
            except (StorageError, ValueError) as error:  # a name that is no number: another program has written there
                _log.warning("%s waits: %s", run.job.id, error)
                run.pause(_PAUSE_SECONDS)
            if run.may_end() and not run.taken and not run.is_leased(END):
                run.ending = True
                self._parts.submit(self._end, run)

    def _take_parts(self) -> None:
        """Begins parts until as many are in memory as are allowed.

        It first takes parts of the batches from which this gateway has the fewest.
        """
        while self._in_hand < MAX_PARTS and not self._stopping.is_set():
            with self._lock:
                open_ = sorted(self.runs.values(), key=lambda run: (len(run.taken), run.job.expires_at))
                chosen = ((run, run.next_part()) for run in open_ if run.goes_on())
                run, number = next((each for each in chosen if each[1] is not None), (None, None))
                if run is None or number is None:
                    return
                run.taken.add(number)
                self._in_hand += 1
            self._parts.submit(self._work, run, number)

    def _work(self, run: BatchRun, number: int) -> None:
        finished = False
        try:
            part = _Part(run, number, self._answerer, self._allowance, self._stopping, self._metrics)
            finished = part.work(self._lines)
        except StorageError as error:
            _log.warning("part %d of %s is given up: %s", number, run.job.id, error)
            run.pause(_PAUSE_SECONDS)
        except Exception:  # noqa: BLE001 - logged; the part is tried again
            _log.exception("part %d of %s failed", number, run.job.id)
            run.pause(_PAUSE_SECONDS)
        with self._lock:
            self._in_hand -= 1
            run.taken.discard(number)
            if finished:
                run.finished.add(number)
        self.woken.set()

    def _expire(self) -> None:
        try:
            self._batches.expire(time.time())
        except StorageError as error:
            _log.warning("files and batches whose time is over stay for now: %s", error)
        except Exception:  # noqa: BLE001 - logged; it is tried again
            _log.exception("deleting files and batches failed")

    def _end(self, run: BatchRun) -> None:
        try:
            if run.end(self._stopping.is_set):
                if not self._tell(run.job):
                    run.pause(LEASE_SECONDS)
                    return
                self._batches.close(run.job.owner, run.job.id)
                self._metrics.ended.labels(run.status).inc()
                _log.info("%s has ended: %s", run.job.id, run.sums)
        except (StorageError, DeliveryError, BadReply, Problem) as error:
            _log.warning("%s could not be ended: %s", run.job.id, error)
            run.pause(_PAUSE_SECONDS)
        except Exception:  # noqa: BLE001 - logged; it is tried again
            _log.exception("ending %s failed", run.job.id)
            run.pause(_PAUSE_SECONDS)
        finally:
            run.ending = False
            self.woken.set()


@dataclass(eq=False, slots=True)
class _Part:
    """One part of a batch while this gateway works on it. One thread runs `work`; a pool's threads answer the lines."""

    _run: BatchRun
    _number: int
    _answerer: LineAnswerer
    _allowance: Allowance
    _stopping: threading.Event
    _metrics: BatchMetrics
    _results: PartResults = field(default_factory=PartResults)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _pending: int = 0  # lines that a thread answers or will answer

    def work(self, lines: ThreadPool) -> bool:
        """Answers the part's lines. Returns True if all have results, False if the part was given up. Raises a StorageError."""
        run, number = self._run, self._number
        run.lease(part_name(number))
        content, self._results, finished = run.read_part(number)
        if finished:
            return True
        missing = [index for index in range(len(content)) if index not in self._results]
        self._pending = len(missing)
        for index in missing:
            lines.submit(self._answer, LinePlace(run.job, number, index, content[index]))
        stored, renewed_at = len(self._results), time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._pending, _CHECKPOINT_SECONDS)
                over, whole = not self._pending, len(self._results) == len(content)
                snapshot = self._results.copy()
            if over:
                break
            if len(snapshot) != stored:
                run.store("work", number, snapshot)
                stored = len(snapshot)
            if time.monotonic() - renewed_at > LEASE_SECONDS / 3:
                run.lease(part_name(number))
                renewed_at = time.monotonic()
        if whole:
            run.store_part(number, snapshot)
        elif len(snapshot) != stored:
            run.store("work", number, snapshot)
        run.release(part_name(number))
        return whole

    def _stopped(self) -> bool:
        if self._stopping.is_set() or not self._run.goes_on():
            return True
        return self._number < self._run.sums.parts or self._number in self._run.finished  # another gateway was faster

    def _answer(self, place: LinePlace) -> None:
        result = self._result(place)
        self._metrics.line("given_up" if result is None else "failed" if result.failed else "answered", result)
        with self._changed:
            if result is not None:
                self._results.add(place.number, result)
            self._pending -= 1
            self._changed.notify_all()

    def _result(self, place: LinePlace) -> LineResult | None:
        """Answers a line, and tries again while that may help. Returns None if the line is given up."""
        failures = errors = 0
        while (slot := self._allowance.enter(self._stopped)) is not None:
            try:

                def begun(generation: Generation) -> None:
                    stream = generation.answers[0].token_stream
                    slot.is_waiting = lambda: stream.timings().queue_seconds is None

                return self._answerer.answer(place, self._run.due(), lambda: slot.preempted or self._stopped(), begun)
            except ClientLeft:
                continue
            except LineDelayed as delayed:
                if isinstance(delayed.problem, RateLimited):
                    self._run.pause(min(_PAUSE_SECONDS, delayed.problem.retry_after_seconds or 1))
                failures += 1
                errors += delayed.problem.status == 500
                if errors == _MAX_ERRORS:
                    return self._answerer.refused(place, delayed.problem)
                seconds = min(_LONGEST_BACK_OFF_SECONDS, max(delayed.problem.retry_after_seconds or 1, 2.0**failures))
            finally:
                self._allowance.leave(slot)
            self._pause(seconds)
        return None

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._stopped():
            time.sleep(min(TICK_SECONDS, max(0.0, end - time.monotonic())))
