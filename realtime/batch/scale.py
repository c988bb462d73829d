"""The options of ``batch`` for more than one machine, and the choice between this machine and a
cluster.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from engines.choose import Choice
from engines.errors import InputError
from engines.options import takes
from realtime.batch.cluster.storage import expanded, is_shared
from realtime.batch.cluster.worker import ATTACHED, attached
from realtime.batch.options import Settings
from realtime.batch.run import process_all
from realtime.latency_budget import open_within


@dataclass(frozen=True)
class Scale:
    """How much, and on what.

    Attributes:
        ray: address of a Ray cluster, see ``realtime.batch.cluster.ray.Cluster``; None for this
            machine alone.
        workers: engines on the cluster at most.
        plan: only estimate, see ``realtime.batch.estimate``.
        cameras, hours, within_h, machines: of the estimate.
    """

    ray: str | None = None
    workers: int | None = None
    plan: bool = False
    cameras: int | None = None
    hours: float | None = None
    within_h: float | None = None
    machines: int | None = None


OPTIONS: dict[str, Any] = {
    "ray": Annotated[
        str | None,
        typer.Option(
            help=(
                "Work on a Ray cluster: auto (this machine's), HOST:PORT, or local (one of this"
                " machine alone)."
            )
        ),
    ],
    "workers": Annotated[
        int | None,
        typer.Option(help="Engines on the cluster; else as many as it has room for.", min=1),
    ],
    "plan": Annotated[
        bool,
        typer.Option("--plan", help="Measure a minute and estimate hours, machines and storage."),
    ],
    "cameras": Annotated[
        int | None, typer.Option(help="For --plan: so many of them, day and night.", min=1)
    ],
    "hours": Annotated[
        float | None, typer.Option(help="For --plan: hours of video, of each camera.", min=0.01)
    ],
    "within_h": Annotated[
        float | None, typer.Option("--within", help="For --plan: hours it may take.", min=0.01)
    ],
    "machines": Annotated[
        int | None, typer.Option(help="For --plan: so many like this one.", min=1)
    ],
}
takes_scale = takes("scale", Scale, OPTIONS)
"""A command's parameter ``scale`` becomes one option for each of these."""


def batch_chosen(
    specs: Sequence[str],
    out: str,
    settings: Settings,
    scale: Scale,
    choice: Choice,
    budget_ms: float | None,
    console: Console,
) -> list[dict[str, Any]]:
    """Work through sources, here or on a cluster; see ``process_all`` and
    ``realtime.batch.cluster.scheduler.process_across``.

    Raises:
        InputError: the options contradict each other.
        SightlineError: see there.
    """
    inputs = [path for field in ATTACHED if isinstance(path := getattr(choice, field), str)]
    if scale.ray is None:
        for spec in (*specs, out):
            if is_shared(spec):
                raise InputError(
                    f"{spec} is on shared storage, which clusters work with: add --ray auto, or"
                    " --ray local"
                )
        if scale.workers is not None:
            raise InputError("--workers is for clusters: add --ray")
        localizer = open_within(choice, budget_ms, console, streams=0, batch=settings.batch)
        return process_all(specs, Path(out), localizer, console, settings, inputs)
    if budget_ms is not None:
        raise InputError("--budget-ms measures one machine: leave it away, or --ray")
    from realtime.batch.cluster.ray import Cluster
    from realtime.batch.cluster.scheduler import process_across

    specs = expanded(specs)
    with Cluster(scale.ray, choice, attached(choice), settings) as cluster:
        return process_across(specs, out, cluster, console, settings, scale.workers, inputs)
