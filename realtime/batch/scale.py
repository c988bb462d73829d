"""The options of ``batch`` for more than one machine, and the choice between this machine and a
cluster.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from engines.errors import InputError
from engines.options import ADVANCED, SPEED, EngineOptions, Option
from realtime.batch.cluster.storage import expanded, is_shared
from realtime.batch.cluster.worker import ATTACHED, attached
from realtime.batch.options import Settings
from realtime.batch.run import process_all
from realtime.latency_budget import open_within


@dataclass(frozen=True)
class Scale:
    """How much there is to do, and on what. ``cameras``, ``hours``, ``within_h`` and ``machines``
    are of the estimate, see ``realtime.batch.estimate``; ``ray`` is an address of
    ``realtime.batch.cluster.ray.Cluster``, None for this machine alone.
    """

    ray: Annotated[
        str | None,
        Option(
            "Work on a Ray cluster: auto (this machine's), HOST:PORT, or local (one of this"
            " machine alone).",
            SPEED,
        ),
    ] = None
    workers: Annotated[
        int | None,
        Option("Engines on the cluster; else as many as it has room for.", SPEED, min=1),
    ] = None
    plan: Annotated[
        bool, Option("Measure a minute and estimate hours, machines and storage.", ADVANCED)
    ] = False
    cameras: Annotated[
        int | None, Option("For --plan: so many of them, day and night.", ADVANCED, min=1)
    ] = None
    hours: Annotated[
        float | None, Option("For --plan: hours of video, of each camera.", ADVANCED, min=0.01)
    ] = None
    within_h: Annotated[
        float | None, Option("For --plan: hours it may take.", ADVANCED, ("within",), min=0.01)
    ] = None
    machines: Annotated[
        int | None, Option("For --plan: so many like this one.", ADVANCED, min=1)
    ] = None


def batch_chosen(
    specs: Sequence[str],
    out: str,
    settings: Settings,
    scale: Scale,
    choice: EngineOptions,
    budget_ms: float | None,
    console: Console,
) -> list[dict[str, Any]]:
    """Work through sources, here or on a cluster; see ``process_all`` and
    ``realtime.batch.cluster.scheduler.process_across``.

    Raises:
        InputError: the options contradict each other.
        SightlineError: see there.
    """
    settings, choice = settings.beside(choice)
    inputs = [path for field in ATTACHED if isinstance(path := getattr(choice, field), str)]
    if scale.ray is None:
        for spec in (*specs, out):
            if is_shared(spec):
                raise InputError(
                    f"{spec} is on shared storage, which clusters work with: use the cluster auto,"
                    " or local",
                    option="ray",
                )
        if scale.workers is not None:
            raise InputError("workers are for clusters: name one", option=("workers", "ray"))
        localizer = open_within(choice, budget_ms, console, streams=0, batch=settings.batch)
        return process_all(specs, Path(out), localizer, console, settings, inputs)
    if budget_ms is not None:
        raise InputError(
            "a budget is measured on one machine: leave it away, or the cluster",
            option=("budget_ms", "ray"),
        )
    from realtime.batch.cluster.ray import Cluster
    from realtime.batch.cluster.scheduler import process_across

    specs = expanded(specs)
    with Cluster(scale.ray, choice, attached(choice), settings) as cluster:
        return process_across(specs, out, cluster, console, settings, scale.workers, inputs)
