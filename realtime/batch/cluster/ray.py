"""The Ray cluster. This is the only file that imports Ray, and only when a cluster is used.

A worker is an actor with an engine of its own. It decodes in its own process, beside engine,
drawing and encoding: compressed packets are what crosses the network. Where workers have GPUs,
tasks on other processors decode for them, a few frames ahead.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from engines.backends.registry import gpu_backends
from engines.errors import EngineError, SightlineError, install_extra
from engines.options import EngineOptions
from realtime.batch.cluster.storage import local_path
from realtime.batch.cluster.worker import AttachedFiles, LostError, Ref, Worker
from realtime.batch.options import Settings
from realtime.batch.segment import Clip, Segment, SegmentEnd, read_segment
from realtime.frames import Frame
from realtime.tracking.options import State

START_RAY = "ray start --head"
CPUS_EACH = 4
"""Processors of a worker without a GPU, where machines have so many: more engines side by side beat
one with more threads.
"""
CHUNK_BYTES = 16_000_000
CHUNKS_AHEAD = 3
"""Frames travel in chunks of so many bytes, and at most so many chunks wait for a worker."""


class Cluster:
    """A connection to a Ray cluster.

    Args:
        address: ``auto`` for the one that this machine is part of, ``local`` for one of this
            machine alone, or ``HOST:PORT``.
        choice: of the engines.
        attached: files that go along with it.
        settings: what workers are asked for.
        fed: whether other tasks decode for the workers; None for where these have GPUs.

    Raises:
        EngineError: Ray is not installed, or there is no such cluster.
    """

    def __init__(
        self,
        address: str,
        choice: EngineOptions,
        attached: AttachedFiles,
        settings: Settings,
        fed: bool | None = None,
    ) -> None:
        ray = self._ray = _connected(address)
        self._tasks: dict[Callable[..., Any], Any] = {}
        nodes = self._nodes()
        self.uses_gpus = choice.backend in gpu_backends() and any(
            node.get("GPU", 0) for node in nodes
        )
        self._fed = self.uses_gpus if fed is None else fed
        sizes = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        self._cpus = (
            1 if self.uses_gpus or self._fed else choice.threads or min([CPUS_EACH, *sizes])
        )
        self._room, self._counted_s = 0, float("-inf")
        self._arguments = ray.put(
            (
                replace(choice, threads=choice.threads or self._cpus),
                dict(attached),
                settings,
                self._fed,
            )
        )

    def room(self) -> int:
        """How many workers the cluster has room for as it is now."""
        if time.monotonic() - self._counted_s > 1.0:
            self._room, self._counted_s = self._count(), time.monotonic()
        return self._room

    def _count(self) -> int:
        nodes, each = self._nodes(), self._cpus + self._fed
        if self.uses_gpus:  # those that decode for them may be elsewhere
            total = int(sum(node.get("CPU", 0) for node in nodes)) // each
            return min(
                total, sum(min(int(node.get("GPU", 0)), int(node.get("CPU", 0))) for node in nodes)
            )
        return (
            int(sum(node.get("CPU", 0) for node in nodes)) // each
            if self._fed
            else sum(int(node.get("CPU", 0)) // self._cpus for node in nodes)
        )

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def start_worker(self) -> "RayWorker":
        """A new worker; it may have to wait for a place, or for Ray to start another machine."""
        kind = self._ray.remote(WorkerActor)
        return RayWorker(
            kind.options(num_cpus=self._cpus, num_gpus=int(self.uses_gpus)).remote(self._arguments)
        )

    def task(self, function: Callable[..., Any], *arguments: Any) -> Ref:
        """Call a function somewhere; again, elsewhere, where that process dies. It waits for data
        more than it computes.
        """
        if function not in self._tasks:
            self._tasks[function] = self._ray.remote(
                num_cpus=0, max_retries=3, scheduling_strategy="SPREAD"
            )(function)
        return self._tasks[function].remote(*arguments)

    def stop_worker(self, worker: "RayWorker") -> None:
        """End a worker."""
        with suppress(Exception):
            self._ray.kill(worker.actor)

    def wait(self, refs: Sequence[Ref], timeout_s: float) -> list[Ref]:
        """Those of the results that are there, as soon as there is one."""
        if not refs:
            time.sleep(min(0.05, timeout_s))
            return []
        done, _ = self._ray.wait(list(refs), num_returns=1, timeout=timeout_s)
        more, _ = self._ray.wait(list(refs), num_returns=len(refs), timeout=0)
        return list(dict.fromkeys([*done, *more]))

    def get(self, ref: Ref) -> Any:
        """A result.

        Raises:
            LostError: whoever worked on it died.
            SightlineError: as it was raised there.
        """
        from ray import exceptions

        try:
            return self._ray.get(ref)
        except exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, SightlineError):
                raise cause from None
            if isinstance(
                cause, exceptions.RayError
            ):  # one that decoded for it died, several times
                raise LostError(str(cause).strip().split("\n", 1)[0]) from error
            raise EngineError(
                f"a worker failed: {str(cause or error).strip().splitlines()[-1]}"
            ) from error
        except exceptions.RayError as error:
            raise LostError(str(error).strip().split("\n", 1)[0]) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ray.shutdown()


class RayWorker:
    """A ``Worker`` on another process: calls give references at once."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def open(self) -> Ref:
        """See ``Worker.open``."""
        return self.actor.open.remote()

    def work(self, clip: Clip, segment: Segment, states: Mapping[int, State]) -> Ref:
        """See ``Worker.work``."""
        return self.actor.work.remote(clip, segment, states)


class WorkerActor(Worker):
    """A ``Worker`` that Ray starts, in a process that has this name."""

    def __init__(self, arguments: tuple[EngineOptions, AttachedFiles, Settings, bool]) -> None:
        choice, attached, settings, fed = arguments
        super().__init__(choice, attached, settings, _frames_from_tasks if fed else read_segment)


def _connected(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise EngineError(
            f"a cluster needs Ray: {install_extra('cluster')}", option="ray"
        ) from error
    if address.startswith("ray://"):
        raise EngineError(
            f"{address} is a client's address: run 'ray job submit' there, with address auto",
            option="ray",
        )
    try:
        with _without_dashboard():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=None,
            )
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        why = str(error).strip().split("\n", 1)[0]
        raise EngineError(
            f"no Ray cluster at {address}: {why}; start one with '{START_RAY}', or use local",
            option="ray",
        ) from error
    return ray


@contextmanager
def _without_dashboard() -> Iterator[None]:
    """A cluster that begins meanwhile has no dashboard process.

    Ray starts it even with ``include_dashboard=False``; it then asks the web addresses of three
    cloud providers where it runs, even with usage reports switched off. Nothing here needs it.
    Clusters that are there already are left as they are.
    """
    from ray._private.node import Node

    start = getattr(Node, "start_api_server", None)
    if start is None:
        yield
        return
    Node.start_api_server = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Node.start_api_server = start  # type: ignore[method-assign]


def _chunks(clip: Clip, segment: Segment, every: int) -> Iterator[list[Frame | SegmentEnd]]:
    """A segment's frames, several at a time."""
    chunk, size = list[Frame | SegmentEnd](), 0
    for item in read_segment(replace(clip, spec=local_path(clip.spec)), segment, every):
        chunk.append(item)
        size += item.image_bgr.nbytes if isinstance(item, Frame) else 0
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    yield chunk


def _frames_from_tasks(clip: Clip, segment: Segment, every: int) -> Iterator[Frame | SegmentEnd]:
    """A segment's frames, decoded by a task on some other processor, whose death costs nothing but
    time.
    """
    import ray

    options: dict[str, Any] = {
        "num_cpus": 1,
        "max_retries": 3,
        "_generator_backpressure_num_objects": CHUNKS_AHEAD,
    }
    decode: Any = ray.remote(**options)(_chunks)
    for ref in decode.remote(clip, segment, every):
        for item in ray.get(ref):
            # the other machine's clock says nothing here
            yield (
                replace(item, captured_ns=time.monotonic_ns()) if isinstance(item, Frame) else item
            )
