"""Chooses the width and the size of each batch, so that requests are answered before their deadlines.

There is no server, no model and no clock in here. The caller gives the time, runs the batches and says how long they
took, so a trace of requests can be replayed on a simulated clock. All times are milliseconds on one clock.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from numbers import Real
from typing import Any

MEMORY = 0.2  # part of the newest batch in the mean of measured over expected times
MARGIN = 2  # mean deviations that an estimate lies above that mean
FORGET_MS = 1000  # time in which a correction without new batches falls to 37 %, so that one pause does not last
OUTLIER = 20  # a batch counts as at most this many times slower than expected


@dataclass(eq=False)
class Request:
    """A request that waits. It is made when it arrives.

    Args:
        arrival: When it arrived, in ms.
        deadline: When it should be answered, in ms on the same clock.
        num_heads: Number of heads that it asks for. None leaves the choice to the scheduler.
        payload: Anything that the caller needs to run and answer it.
    """

    arrival: float
    deadline: float
    num_heads: int | None = None
    payload: Any = None


@dataclass
class Batch:
    """What to do now: run `requests` at `num_heads`, and turn `refused` away. Both may be empty."""

    num_heads: int | None = None
    requests: list[Request] = field(default_factory=list)
    refused: list[Request] = field(default_factory=list)


class Latencies:
    """How long a batch of a width takes, in ms: measured once, then corrected by what batches take.

    The correction is one factor for all widths: the mean of measured over expected times of the last batches, plus
    `MARGIN` times their mean deviation. A busy neighbour or a slower clock raises it, and a machine whose times scatter
    keeps a distance from its deadlines. Without batches it falls back to 1.

    Args:
        rows: Rows with `num_heads`, `batch_size` and `latency_ms`, as `profile_subnetworks` returns them, of one or
            several batch sizes for each width. Times between the sizes are interpolated. A time above that of a wider
            width or a larger batch is taken for a disturbance, and lowered to it. The largest size of a width is the
            largest batch that it runs.

    Raises:
        ValueError: There are no rows, or a time is not a positive number.

    Examples:
        >>> from hydravit_hf.serving import Latencies
        >>> rows = [{"num_heads": 3, "batch_size": 1, "latency_ms": 4.0}]
        >>> latencies = Latencies([*rows, {"num_heads": 3, "batch_size": 3, "latency_ms": 8.0}])
        >>> latencies(3, 2), latencies.largest(3)
        (6.0, 3)
    """

    def __init__(self, rows: Iterable[dict]):
        measured = {}
        for row in rows:
            latency = row["latency_ms"]
            if not isinstance(latency, Real) or not 0 < latency < float("inf"):
                raise ValueError(f"`latency_ms` must be a positive number, not {latency!r}.")
            measured.setdefault(row["num_heads"], {})[row["batch_size"]] = latency
        if not measured:
            raise ValueError("`rows` must have at least one row.")
        self._expected = _without_outliers({k: _interpolate(measured[k]) for k in sorted(measured)})
        self.heads = list(self._expected)
        self._ratio, self._deviation, self._updated = 1.0, 0.0, 0.0
        self._factor = 1.0

    def __call__(self, num_heads: int, batch_size: int) -> float:
        """Estimate the ms of a batch that starts now."""
        return self._factor * self._expected[num_heads][batch_size - 1]

    def largest(self, num_heads: int) -> int:
        """The largest batch of a width."""
        return len(self._expected[num_heads])

    def update(self, num_heads: int, batch_size: int, took: float, now: float):
        """Take note that a batch took `took` ms and ended at `now`."""
        ratio = min(took / self._expected[num_heads][batch_size - 1], OUTLIER)
        self._deviation += MEMORY * (abs(ratio - self._ratio) - self._deviation)
        self._ratio += MEMORY * (ratio - self._ratio)
        self._updated = now
        self.at(now)

    def at(self, now: float):
        """Let the correction fade by the time since the last batch."""
        fading = 2.718281828 ** (-max(now - self._updated, 0) / FORGET_MS)
        self._factor = 1 + fading * (self._ratio + MARGIN * self._deviation - 1)


class Scheduler:
    """A queue of requests with deadlines, and the choice of the next batch.

    Requests run in the order of their deadlines. Those that leave the width to the scheduler run at the widest width at
    which all of them, in batches of that width, would be on time. If none keeps all deadlines, they run at the
    narrowest, in the batch that keeps the most deadlines a second. So the width falls as the queue grows, and rises
    when it is short again. The batch never waits for more requests. Requests that ask for a width run at that width,
    together.

    A request that has no time left even for the narrowest width, or the one that it asks for, is late. So is one whose
    deadline comes before the end of that batch. A late request runs after all others, or is refused.

    The policy comes from SlackFit of SuperServe (NSDI 2025), which chooses by the slack of the most urgent request
    alone. docs/serving.md compares the two.

    Args:
        latencies: Expected times of the batches.
        heads: Head counts that the scheduler chooses from. None means all of `latencies`. A request may ask for any of
            `latencies`.
        late: "answer" runs late requests after all others. "refuse" turns them away.
        reserve_ms: Time that an answer takes beside its batch.

    Raises:
        ValueError: An argument is out of its range.

    Examples:
        >>> from hydravit_hf.serving import Latencies, Request, Scheduler
        >>> rows = [{"num_heads": 3, "batch_size": 2, "latency_ms": 5.0}]
        >>> rows += [{"num_heads": 12, "batch_size": 2, "latency_ms": 40.0}]
        >>> scheduler = Scheduler(Latencies(rows))
        >>> for number in range(3):
        ...     scheduler.add(Request(arrival=0, deadline=60))
        >>> scheduler.next_batch(now=0).num_heads  # two batches of 12 heads would take 80 ms
        3
        >>> scheduler.next_batch(now=5).num_heads
        12
    """

    def __init__(
        self, latencies: Latencies, heads: list[int] | None = None, late: str = "answer", reserve_ms: float = 2.0
    ):
        if late not in ("answer", "refuse"):
            raise ValueError(f'`late` must be "answer" or "refuse", not {late!r}.')
        self.latencies = latencies
        self.heads = sorted(latencies.heads if heads is None else heads)
        if not self.heads or not set(self.heads) <= set(latencies.heads):
            raise ValueError(f"`heads` must be some of {latencies.heads}, not {heads!r}.")
        self.late, self.reserve_ms = late, reserve_ms
        # Width that is asked for, or None -> requests in the order of their deadlines
        self._waiting = {num_heads: [] for num_heads in (None, *latencies.heads)}
        self._late = {num_heads: [] for num_heads in (None, *latencies.heads)}
        self._numbers = count()

    def __len__(self) -> int:
        """The number of requests that wait."""
        return sum(map(len, self._waiting.values())) + sum(map(len, self._late.values()))

    def add(self, request: Request):
        """Add a request to the queue.

        Raises:
            ValueError: It asks for a width that has no latency.
        """
        if request.num_heads not in self._waiting:
            raise ValueError(f"`num_heads` must be one of {self.latencies.heads}, not {request.num_heads!r}.")
        # The number keeps the order of arrival among equal deadlines, and keeps requests from being compared
        insort(self._waiting[request.num_heads], (request.deadline, next(self._numbers), request))

    def next_batch(self, now: float) -> Batch:
        """Take the next batch out of the queue."""
        self.latencies.at(now)
        refused = self._set_late_aside(now)
        urgent = min((queue[0] for queue in self._waiting.values() if queue), default=None)
        if urgent is not None:
            asked = urgent[2].num_heads
            queue = self._waiting[asked]
            num_heads, part = self._choose(asked, now)
        elif any(self._late.values()):
            asked, queue = min(self._late.items(), key=lambda item: item[1][0] if item[1] else (float("inf"),))
            num_heads = self.heads[0] if asked is None else asked
            part = slice(0, self.latencies.largest(num_heads))
        else:
            return Batch(refused=refused)
        requests = [request for _, _, request in queue[part]]
        del queue[part]
        return Batch(num_heads, requests, refused)

    def done(self, batch: Batch, took: float, now: float):
        """Take note of how long a batch took."""
        self.latencies.update(batch.num_heads, len(batch.requests), took, now)

    def _set_late_aside(self, now: float) -> list[Request]:
        """Move the requests that can't be on time out of the queue. Returns those that are refused."""
        refused = []
        for asked, queue in self._waiting.items():
            least = self._end(now, self.heads[0] if asked is None else asked, 1)
            late = 0
            while late < len(queue) and queue[late][0] < least:
                late += 1
            if self.late == "answer":
                self._late[asked] += queue[:late]
            else:
                refused += [request for _, _, request in queue[:late]]
            del queue[:late]
        return refused

    def _choose(self, asked: int | None, now: float) -> tuple[int, slice]:
        """The widest width at which the whole queue is on time, and the part of the queue that is its batch."""
        queue, others = self._waiting[asked], self._asked(asked)
        widths = self.heads[::-1] if asked is None else [asked]
        for num_heads in widths:
            size = min(len(queue), self.latencies.largest(num_heads))
            while size:
                if self._is_on_time(queue, num_heads, size, now, others):
                    return num_heads, slice(0, size)
                size //= 2
        return widths[-1], self._fullest(widths[-1], queue, now)

    def _is_on_time(self, queue: list, num_heads: int, size: int, now: float, others: list) -> bool:
        """Whether a batch of `size`, then the others that ask for a width, and then the rest of the queue in the
        largest batches, meet their deadlines. Of the others, the most urgent ones are looked at."""
        end = self._end(now, num_heads, size)
        if queue[0][0] < end or any(waiting[0][0] < end + ms for waiting, ms in others):
            return False
        end, largest = end + sum(ms for _, ms in others), self.latencies.largest(num_heads)
        for first in range(size, len(queue), largest):
            end += self.latencies(num_heads, min(largest, len(queue) - first))
            if queue[first][0] < end:
                return False
        return True

    def _fullest(self, num_heads: int, queue: list, now: float) -> slice:
        """The part of the queue that keeps the most deadlines a second as one batch. Those before it are given up."""
        best, part = 0.0, slice(0, 1)
        for size in range(1, min(len(queue), self.latencies.largest(num_heads)) + 1):
            first = bisect_left(queue, (self._end(now, num_heads, size),))
            rate = min(size, len(queue) - first) / self.latencies(num_heads, size)
            if rate > best:
                best, part = rate, slice(first, first + size)
        return part

    def _asked(self, but: int | None) -> list[tuple[list, float]]:
        """The queues of the requests that ask for a width other than `but`, and the time that each takes."""
        asked = []
        for num_heads, queue in self._waiting.items():
            if num_heads not in (None, but) and queue:
                largest = self.latencies.largest(num_heads)
                batches, rest = divmod(len(queue), largest)
                ms = batches * self.latencies(num_heads, largest) + (self.latencies(num_heads, rest) if rest else 0)
                asked.append((queue, ms))
        return asked

    def _end(self, now: float, num_heads: int, size: int) -> float:
        return now + self.latencies(num_heads, size) + self.reserve_ms


def replay(scheduler: Scheduler, requests: Iterable[Request], took: Callable[[int, int, float], float]) -> list[dict]:
    """Run a trace of requests on a simulated clock, on one machine that runs one batch at a time.

    It tells what a deadline or a choice of widths would do to a load, without a server.

    Args:
        scheduler: A new scheduler. It learns from the batches.
        requests: The requests in the order of their arrivals.
        took: Function of the number of heads, the batch size and the time, that returns the ms that a batch takes.

    Returns:
        A row for each request, in the order in which they end: `request`, `num_heads` (None if it was refused),
        `batch_size`, `start` and `end` in ms, and `is_on_time`.

    Examples:
        >>> from hydravit_hf.serving import Latencies, Request, Scheduler, replay
        >>> rows = [{"num_heads": k, "batch_size": 1, "latency_ms": ms} for k, ms in ((3, 5.0), (12, 40.0))]
        >>> requests = [Request(arrival, arrival + 60) for arrival in (0, 10, 20)]
        >>> rows = replay(Scheduler(Latencies(rows)), requests, lambda num_heads, size, now: {3: 5, 12: 40}[num_heads])
        >>> [(row["num_heads"], row["end"]) for row in rows]
        [(12, 40.0), (3, 45.0), (3, 50.0)]
    """
    rows, now = [], 0.0
    arrivals = sorted(requests, key=lambda request: request.arrival)
    position = 0
    while True:
        while position < len(arrivals) and arrivals[position].arrival <= now:
            scheduler.add(arrivals[position])
            position += 1
        batch = scheduler.next_batch(now)
        rows += [_row(request, None, 0, now, now) for request in batch.refused]
        if batch.requests:
            size = len(batch.requests)
            start, now = now, now + took(batch.num_heads, size, now)
            scheduler.done(batch, now - start, now)
            rows += [_row(request, batch.num_heads, size, start, now) for request in batch.requests]
        elif position < len(arrivals):
            now = arrivals[position].arrival
        else:
            return rows


def _row(request: Request, num_heads: int | None, size: int, start: float, end: float) -> dict:
    is_on_time = num_heads is not None and end <= request.deadline
    return {
        "request": request,
        "num_heads": num_heads,
        "batch_size": size,
        "start": start,
        "end": end,
        "is_on_time": is_on_time,
    }


def _interpolate(measured: dict[int, float]) -> list[float]:
    """The times of all batch sizes up to the largest that was measured; below the smallest, they are proportional."""
    sizes = sorted(measured)
    times, before = [], (0, 0.0)
    for size in sizes:
        (last, least), most = before, measured[size]
        times += [least + (most - least) * (step - last) / (size - last) for step in range(last + 1, size + 1)]
        before = (size, most)
    return times


def _without_outliers(times: dict[int, list[float]]) -> dict[int, list[float]]:
    """Lower each time to the least of those at its width and wider, and at its batch size and larger."""
    cleaned, wider = {}, []
    for num_heads in reversed(times):
        row = [min(pair) for pair in zip(times[num_heads], wider, strict=False)] + times[num_heads][len(wider) :]
        for index in reversed(range(len(row) - 1)):
            row[index] = min(row[index], row[index + 1])
        cleaned[num_heads] = wider = row
    return dict(reversed(cleaned.items()))
