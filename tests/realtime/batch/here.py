"""A cluster without Ray: workers are in this process and do what they are asked when they are
waited for; some die.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engines.errors import SightlineError
from engines.options import EngineOptions
from realtime.batch.cluster.worker import LostError, Opened, Worker, attached
from realtime.batch.options import Settings
from realtime.batch.segment import Clip, Segment


@dataclass(eq=False)
class Call:
    """A reference to a result, and how it is had."""

    run: Callable[[], Any]
    done: bool = False
    value: Any = None
    error: Exception | None = None

    def finish(self) -> None:
        self.done = True
        try:
            self.value = self.run()
        except (SightlineError, LostError) as error:
            self.error = error


@dataclass
class Here:
    """See ``realtime.batch.cluster.worker.Cluster``.

    Attributes:
        places: workers that there is room for.
        dies: called with the clip and the segment before each piece of work; true kills the worker.
        says: changes what the worker of that number says of itself.
        worked: (number of the worker, clip's name, segment's index) of what was done, in order.
    """

    choice: EngineOptions
    settings: Settings = field(default_factory=Settings)
    places: int = 2
    dies: Callable[[Clip, Segment], bool] = lambda *_: False
    says: dict[int, Callable[[Opened], Opened]] = field(default_factory=dict)
    worked: list[tuple[int, str, int]] = field(default_factory=list)
    started_workers: int = 0
    calls: deque[Call] = field(default_factory=deque)

    def room(self) -> int:
        return self.places

    def start_worker(self) -> "_HereWorker":
        self.started_workers += 1
        return _HereWorker(
            self,
            self.started_workers - 1,
            Worker(self.choice, attached(self.choice), self.settings),
        )

    def stop_worker(self, worker: "_HereWorker") -> None:
        worker.dead = True

    def task(self, function: Callable[..., Any], *arguments: Any) -> Call:
        return self.ask(lambda: function(*arguments))

    def ask(self, run: Callable[[], Any]) -> Call:
        self.calls.append(Call(run))
        return self.calls[-1]

    def wait(self, refs: Sequence[Call], timeout_s: float) -> list[Call]:
        if not any(ref.done for ref in refs) and self.calls:
            self.calls.popleft().finish()
        return [ref for ref in refs if ref.done]

    def get(self, ref: Call) -> Any:
        if ref.error is not None:
            raise ref.error
        return ref.value


@dataclass(eq=False)
class _HereWorker:
    cluster: Here
    number: int
    worker: Worker
    dead: bool = False

    def open(self) -> Call:
        def run() -> Opened:
            return self.cluster.says.get(self.number, lambda said: said)(self.worker.open())

        return self.cluster.ask(run)

    def work(self, clip: Clip, segment: Segment, states: dict) -> Call:
        def run() -> dict[str, bytes]:
            self.dead = self.dead or self.cluster.dies(clip, segment)
            if self.dead:
                raise LostError("killed")
            self.cluster.worked.append((self.number, clip.name, segment.index))
            return self.worker.work(clip, segment, states)

        return self.cluster.ask(run)
