"""Real Ray: two nodes on this machine, a worker that is killed, a driver that is killed."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.errors import EngineError
from tests.realtime.batch.clips import make_clip
from tests.realtime.batch.test_resume import assert_same, begin, finish, records, uninterrupted

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[cluster]'")
NAMES = ["first", "second", "third"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """Two nodes of one processor each."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100_000_000}
    found = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        found.add_node(**node)
        found.wait_for_nodes()
        yield found
    finally:
        found.shutdown()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with three clips, and the results of one process in ``whole``."""
    folder = tmp_path_factory.mktemp("ray")
    for name, seconds in zip(NAMES, (32, 12, 24), strict=True):
        make_clip(
            folder / f"{name}.mp4",
            seconds=seconds,
            rate="20",
            size="96x64",
            sound="aac" if name == "first" else "",
        )
    uninterrupted(*(folder / f"{name}.mp4" for name in NAMES), "--out", folder / "whole")
    return folder


def workers_of(cluster) -> list[int]:
    """Processes of this cluster that work on a segment now."""
    raylets = {
        each.process.pid
        for node in cluster.list_all_nodes()
        for each in node.all_processes["raylet"]
    }
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in raylets and b"WorkerActor.work" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            pass  # it has ended meanwhile
    return found


def test_a_worker_killed_in_its_work_costs_only_its_segment(cluster, made, tmp_path):
    clips = [made / f"{name}.mp4" for name in NAMES]
    process = begin(*clips, "--out", tmp_path, "--ray", cluster.address)
    killed = 0
    while process.poll() is None and not killed:
        if records(tmp_path):
            for pid in workers_of(cluster)[:1]:
                os.kill(pid, signal.SIGKILL)
                killed += 1
    finish(process)
    assert killed
    assert_same(tmp_path, made / "whole", NAMES)


@pytest.mark.long
def test_a_driver_that_is_killed_goes_on_where_it_was(cluster, made, tmp_path):
    clips = [made / f"{name}.mp4" for name in NAMES]
    draw = random.Random(3)
    kills = 0
    for _ in range(3):
        process, before = (
            begin(*clips, "--out", tmp_path, "--ray", cluster.address),
            records(tmp_path),
        )
        while process.poll() is None and records(tmp_path) <= before:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stderr.close()
    assert kills
    finish(begin(*clips, "--out", tmp_path, "--ray", cluster.address))
    assert_same(tmp_path, made / "whole", NAMES)


@pytest.mark.long
def test_others_decode_for_the_workers_and_the_results_are_the_same(cluster, made, tmp_path):
    """As where workers have GPUs: frames come through the object store."""
    import io

    from rich.console import Console

    from engines.options import EngineOptions
    from realtime.batch.cluster.ray import Cluster
    from realtime.batch.cluster.scheduler import process_across
    from realtime.batch.options import Settings

    choice, settings = EngineOptions(weights="random", size_px=32), Settings()
    clips = [str(made / f"{name}.mp4") for name in NAMES]
    with Cluster(cluster.address, choice, {}, settings, fed=True) as here:
        assert here.room() == 1  # one works, one decodes
        process_across(clips, str(tmp_path), here, Console(file=io.StringIO()), settings)
    assert_same(tmp_path, made / "whole", NAMES)


def test_where_there_is_no_cluster_one_line_says_so():
    from engines.options import EngineOptions
    from realtime.batch.cluster.ray import Cluster
    from realtime.batch.options import Settings

    with pytest.raises(EngineError, match="run 'ray job submit' there"):
        Cluster("ray://127.0.0.1:10001", EngineOptions(), {}, Settings())
