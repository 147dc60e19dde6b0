"""What one client may ask: requests and tokens a minute, answers at once, the largest answer, and whose turn comes first.

Windows slide, so that no minute has more than its share, whenever it begins. A request that is refused costs nothing else: it
is refused before it is tokenized. Tokens are known when an answer has ended, so that who has some left may begin one more.
Answers at once are counted in this gateway alone; requests and tokens too, unless there is a store that all gateways share.
"""

import threading
from collections import Counter
from collections.abc import Callable

from eventing.problems import InvalidRequest, RateLimited
from functions.configuration.api_keys import Allowance
from functions.gateway.answers.windows import Windows

Leave = Callable[[int], None]
"""Ends an answer, which took so many tokens, prompt and all."""


def _nothing_of_its_own(_: str) -> Allowance:
    return Allowance()


class ClientLimits:
    """Thread-safe."""

    def __init__(
        self,
        of_all: Allowance,
        of_one: Callable[[str], Allowance] = _nothing_of_its_own,
        store: str | None = None,
        scope: str = "",
    ) -> None:
        """of_all: of every client of which `of_one` says nothing. store: URL of what gateways share; scope: its key there."""
        self._of_all = of_all
        self._of_one = of_one
        self._store = store
        self._scope = scope
        self._windows: Windows | None = None
        self._running: Counter[str] = Counter()
        self._lock = threading.Lock()

    def allowance(self, client_id: str) -> Allowance:
        """None and 0: as much as it likes."""
        return self._of_one(client_id).over(self._of_all)

    def enter(self, client_id: str, answers: int = 1) -> Leave:
        """With one request for so many answers; whoever enters calls the returned, once for each.

        Raises RateLimited, and InvalidRequest where they are more than it may ever have at once.
        """
        allowed = self.allowance(client_id)
        if allowed.concurrent and answers > allowed.concurrent:
            raise InvalidRequest(
                f"{answers} answers of one request are more than the {allowed.concurrent} that this client may have at once"
            )
        with self._lock:
            if allowed.concurrent and self._running[client_id] + answers > allowed.concurrent:
                raise RateLimited(f"{allowed.concurrent} answers at once are what this client may have; wait for one of them")
            self._running[client_id] += answers
        try:
            self._take(client_id, allowed)
        except BaseException:
            self._gone(client_id, answers)
            raise
        return lambda tokens: self._leave(client_id, tokens)

    def _take(self, client_id: str, allowed: Allowance) -> None:
        """One request, if there are tokens left, too. Raises RateLimited, and takes nothing then."""
        if (tokens := allowed.tokens_per_minute) and not self._counted.test(tokens, self._scope, "tokens", client_id):
            raise self._refusal(tokens, "tokens", client_id)
        if (most := allowed.requests_per_minute) and not self._counted.hit(most, self._scope, "requests", client_id):
            raise self._refusal(most, "requests", client_id)

    def _leave(self, client_id: str, tokens: int) -> None:
        self._gone(client_id)
        limit = self.allowance(client_id).tokens_per_minute
        if limit and tokens:
            self._counted.charge(limit, tokens, self._scope, "tokens", client_id)

    def _gone(self, client_id: str, answers: int = 1) -> None:
        with self._lock:
            self._running[client_id] -= answers
            if not self._running[client_id]:
                del self._running[client_id]

    def _refusal(self, limit: int, what: str, client_id: str) -> RateLimited:
        seconds = self._counted.seconds_left(limit, self._scope, what, client_id)
        return RateLimited(f"{limit} {what} a minute are what this client may have; ask again in {seconds} s", seconds)

    @property
    def _counted(self) -> Windows:
        """Made when it is needed: a gateway without limits imports nothing for them."""
        with self._lock:
            if self._windows is None:
                self._windows = Windows(self._store)
            return self._windows
