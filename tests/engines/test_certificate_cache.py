"""Built engines in the cache: found by what they are of, whole or not at all, built again where
they are damaged.
"""

from dataclasses import fields, replace

import pytest

from engines.build import build_graph
from engines.certificate import (
    CorruptEngineError,
    EngineKey,
    engines_dir,
    find_engine,
    graph_digest,
    load_or_build,
    read_engine,
    write_engine,
)
from engines.errors import REBUILD, EngineError, OutputError
from engines.networks.registry import load_classifier

KEY = EngineKey("net", "a" * 64, "tensorrt", "11.4.0.106", "NVIDIA L4 sm89", "fp16", 1)
PLAN = bytes(range(256)) * 8


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "cache"))


def no_notice(line):
    raise AssertionError(line)


def test_an_engine_is_built_once_and_found_again():
    assert find_engine([KEY]) is None
    assert load_or_build(KEY, lambda: PLAN, no_notice) == PLAN
    assert load_or_build(KEY, lambda: pytest.fail("built twice"), no_notice) == PLAN
    assert find_engine([replace(KEY, target="sm89"), KEY])[:2] == (KEY, PLAN)
    assert load_or_build(KEY, lambda: b"new", no_notice, rebuild=True) == b"new"
    assert read_engine(KEY.path)[:2] == (KEY, b"new")
    assert [p.name for p in engines_dir().iterdir()] == [KEY.path.name]


@pytest.mark.parametrize("name", [f.name for f in fields(EngineKey)])
def test_whatever_differs_is_another_engine(name):
    other = replace(KEY, **{name: 8 if name == "batch" else "other"})
    assert other.path != KEY.path
    write_engine(KEY.path, KEY, PLAN)
    assert find_engine([other]) is None


def test_the_graphs_hash_sees_weights_head_size_and_batch():
    classifier = load_classifier("compact", "random", 64)
    first = build_graph(classifier)
    assert graph_digest(first) == graph_digest(
        build_graph(load_classifier("compact", "random", 64))
    )
    changed = build_graph(classifier)
    changed.graph.initializer[3].raw_data = b"\x01" + changed.graph.initializer[3].raw_data[1:]
    others = [
        changed,
        build_graph(classifier, batch=2),
        build_graph(load_classifier("compact", "random", 96)),
    ]
    assert len({graph_digest(model) for model in [first, *others]}) == 4


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-1], "cut off or damaged"),
        (lambda content: content[: len(content) // 2], "cut off or damaged"),
        (lambda content: content[:-9] + b"x" + content[-8:], "cut off or damaged"),
        (lambda content: content[:20], "header is damaged"),
        (lambda content: content[:12], "header is damaged"),
        (lambda content: b"", "is empty"),
        (lambda content: b"vtrt" + content, "no engine of Sightline's"),
    ],
)
def test_a_damaged_engine_is_built_again_and_says_so(damage, words):
    write_engine(KEY.path, KEY, PLAN)
    KEY.path.write_bytes(damage(KEY.path.read_bytes()))
    with pytest.raises(CorruptEngineError, match=f"{words}; build it again with '{REBUILD}'"):
        find_engine([KEY])
    notify = []
    assert load_or_build(KEY, lambda: PLAN, notify.append) == PLAN
    assert len(notify) == 1
    assert words in notify[0]
    assert notify[0].endswith("building it again")
    assert find_engine([KEY])[:2] == (KEY, PLAN)


def test_another_engine_under_this_name_is_not_taken():
    write_engine(KEY.path, replace(KEY, target="Tesla T4 sm75"), PLAN)
    with pytest.raises(CorruptEngineError, match="holds another engine"):
        find_engine([KEY])


def test_a_build_that_fails_leaves_nothing():
    def fails():
        raise EngineError("no memory")

    with pytest.raises(EngineError, match="no memory"):
        load_or_build(KEY, fails, no_notice)
    assert not engines_dir().exists() or not list(engines_dir().iterdir())


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot write"):
        load_or_build(KEY, lambda: PLAN, no_notice)
