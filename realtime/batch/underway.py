"""A source between the user's naming it and its summary, in a batch on a cluster."""

from collections import Counter, deque
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engines.text import shown
from realtime.batch.clip import Clip, Segment
from realtime.batch.job import Job
from realtime.batch.storage import is_shared

Summary = dict[str, Any]


@dataclass(eq=False)
class Source:
    """One source on its way.

    Attributes:
        place: among the sources.
        spec: what the user typed.
        name: of its results.
        ident: of the file on shared storage, see ``realtime.batch.storage.identity``.
        digest: of its content, when it is known.
        job: what is known of its work, when there is something.
        todo: segments that nobody has.
        out: how many somebody has.
        resumed: how many were done when it began.
        tries: of each segment, how many workers died of it.
        over: its summary is written.
        lock: keeps other runs away from its job.
    """

    place: int
    spec: str
    name: str
    ident: str = ""
    digest: str = ""
    job: Job | None = None
    todo: deque[Segment] = field(default_factory=deque)
    out: int = 0
    resumed: int = 0
    tries: Counter[int] = field(default_factory=Counter)
    over: bool = False
    lock: ExitStack = field(default_factory=ExitStack)

    @property
    def where(self) -> str:
        """Its name on every machine."""
        return self.spec if is_shared(self.spec) else str(Path(self.spec).absolute())

    @property
    def clip(self) -> Clip:
        assert self.job is not None
        assert self.job.clip is not None
        return replace(self.job.clip, spec=self.where)  # it may have been planned on another machine

    def told(self, summary: Summary) -> Summary:
        """A summary that says of what it is."""
        return {"source": shown(self.spec), **summary}
