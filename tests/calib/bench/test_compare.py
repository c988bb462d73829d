"""Two benches beside each other: what is called a regression."""

import json

import pytest

from calib.bench import run as bench
from calib.bench.compare import changes, compare, load_bench
from calib.bench.turns import PEERS
from engines.errors import SightlineError, SourceError
from engines.options import EngineOptions
from tests.command_line import command, process, refused


def saved(path, scale=1.0, windows=(0.99, 1.0, 1.01), **changed):
    """A result in which ours take ``scale`` as long, with a spread of ``windows``."""

    def row(name, ms):
        return {
            "name": name,
            "p50_ms": ms,
            "ratio": 1,
            "windows_ms": [ms * share for share in windows],
        }

    peers_rows = [row("Sightline bf16", 8.0 * scale), row("torch eager forward only", 9.0)]
    bench_of = {
        "fps": 100 / scale,
        "latency_ms": {"p50": 10 * scale},
        "machine": "m",
        "engine": "e",
        "source": "s",
        "peers": peers_rows,
        "windows": {
            name: [10 * scale * share for share in windows]
            for name in ("ms_per_frame", "latency_ms")
        },
        "engines": [{"engine": "compact at 128 px", "peers": peers_rows}],
    }
    path.write_text(json.dumps({**bench_of, **changed}))
    return path


@pytest.mark.parametrize(
    ("scale", "windows", "regressed"),
    [
        (1.1, (0.99, 1.0, 1.01), True),
        (1.1, (0.93, 1.0, 1.07), False),
        (1.029, (1.0, 1.0, 1.0), False),
        (0.5, (0.99, 1.0, 1.01), False),
    ],
    ids=["beyond noise", "within noise", "too small to matter", "faster"],
)
def test_a_regression_is_what_is_slower_beyond_the_runs_own_noise(
    tmp_path, scale, windows, regressed
):
    before, after = (
        saved(tmp_path / "a.json", 1.0, windows),
        saved(tmp_path / "b.json", scale, windows),
    )
    found, differing = compare(before, after, across_machines=False)
    assert {change.regressed for change in found if change.is_ours} == {regressed}
    assert not differing
    assert not any(change.regressed for change in found if not change.is_ours)


def test_peers_that_got_slower_are_no_regression_of_ours(tmp_path):
    before, after = load_bench(saved(tmp_path / "a.json")), load_bench(saved(tmp_path / "b.json"))
    slower = after["engines"][0]["peers"][1]
    slower.update(p50_ms=20.0, windows_ms=[20.0] * 3)
    assert [change.verdict for change in changes(before, after) if not change.is_ours] == ["slower"]
    assert not any(change.regressed for change in changes(before, after))


def test_comparing_by_the_command_line(tmp_path):
    before, after = saved(tmp_path / "a.json"), saved(tmp_path / "b.json", 1.3)
    same = command("bench", "compare", before, before)
    assert (same.returncode, "nothing of ours is slower" in same.stderr) == (0, True)
    slower = command("bench", "compare", before, after, "--json")
    assert slower.returncode == 1, slower.stderr
    report = json.loads(slower.stdout)
    assert "compact at 128 px: Sightline bf16" in report["regressed"]
    assert report["rows"][0]["change"] == pytest.approx(0.3)
    elsewhere = saved(tmp_path / "c.json", 1.3, machine="another")
    assert "machine: m / another" in refused("bench", "compare", before, elsewhere)
    across = command("bench", "compare", before, elsewhere, "--across-machines")
    assert across.returncode == 1
    assert "not measured alike: machine: m / another" in across.stderr


@pytest.mark.long
def test_the_command_benches_and_its_result_can_be_compared(tmp_path):
    """Without a C++ compiler, which torch.compile needs: its row says so, and the others are
    there.
    """
    arguments = (
        "bench",
        "demo:20",
        "--models",
        "compact",
        "--weights",
        "random",
        "--size",
        64,
        "--seconds",
        0.2,
        "--json",
    )
    result = process(
        *arguments, CXX="/nonexistent/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    others = {row["name"] for row in found["peers"] if not row["name"].startswith("Sightline")}
    assert others == {*PEERS} - {"torch.compile forward + autograd"}
    (missing,) = found["not_available"]
    assert "No working C++ compiler" in missing["why"]
    assert "torch.compile forward + autograd: not available: " in result.stderr
    (tmp_path / "a.json").write_text(result.stdout)
    assert command("bench", "compare", tmp_path / "a.json", tmp_path / "a.json").returncode == 0


def test_what_cannot_be_compared_or_run_is_one_line(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    good = saved(tmp_path / "a.json")
    assert "x.json is not a result of bench" in refused(
        "bench", "compare", good, tmp_path / "x.json"
    )
    assert "cannot read" in refused("bench", "compare", good, tmp_path / "none.json")
    assert "compare takes two results" in refused("bench", "compare", good)
    assert "bench runs one source" in refused("bench", "demo:3", "demo:4")
    assert "sizes 96,x: write whole numbers" in refused("bench", "demo:3", "--sizes", "96,x")
    with pytest.raises(SourceError, match="incomplete"):
        changes({"latency_ms": {}, "peers": [{}]}, {"latency_ms": {}, "peers": []})
    with pytest.raises(SightlineError, match="batches 0"):
        bench.whole_numbers("0", "--batches")


def test_weights_belong_to_the_networks_named():
    shipped, random = bench.choices("compact, vgg16", EngineOptions())
    assert (shipped.weights, random.model, random.weights) == (None, "vgg16", "random")
    assert [c.weights for c in bench.choices("compact,vgg16", EngineOptions(weights="v.pth"))] == [
        None,
        "v.pth",
    ]
    assert [c.weights for c in bench.choices("compact", EngineOptions(weights="mine.npz"))] == [
        "mine.npz"
    ]
