"""The columns of a log: one table makes the JSON row, the Parquet schema and the documents."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet

from engines.dense_names import BoxName
from engines.localizer import Detection, Localization
from engines.networks.network import NO_CLASSES
from realtime import frames
from realtime.batch.report import arrow_schema, write_rows
from realtime.frames import Column, Frame, FrameRecord, Track, Tracked, columns_table

BATCH_PAGE = Path(__file__).parents[2] / "docs" / "batch.md"


def a_record(**more):
    frame = Frame(np.zeros((8, 8, 3), np.uint8), "s", 3, 0.1, 7, 0.5)
    found = Localization((1.0, 2.0, 3.0, 4.0), 0, "cat", 0.5, np.zeros((4, 4), np.float32))
    stages = {"read": 0.5, "wait": 0.1, "prepare": 0.2, "engine": 3.0, "draw": 1.0, "write": 0.3}
    return FrameRecord(frame, found=found, stages_ms=stages, total_ms=5.1, **more)


def test_a_row_has_its_columns_in_the_order_of_the_table():
    track = Track("following", 0.75, 1, None)
    names = list(a_record().row())
    assert names[:9] == [
        "source",
        "frame",
        "pts_s",
        "captured_ns",
        "outcome",
        "cause",
        "class_id",
        "class_name",
        "score",
    ]
    assert names[9:16] == ["label", "sure", "x0", "y0", "x1", "y1", "boxes"]
    assert names[-2:] == ["total_ms", "rung"]
    with_track = a_record(track=track, objects=(Tracked(None, 0, "cat", 0.5, track),)).row()
    assert list(with_track)[-4:] == ["confidence", "track_id", "raw", "objects"]
    assert list(with_track["objects"][0]) == [each.name for each in frames.TRACKED_COLUMNS]


def test_a_row_says_what_is_shown_how_sure_it_is_and_where_nothing_is():
    plain = a_record().row()
    assert (plain["label"], plain["sure"], plain["boxes"]) == ("cat", None, 1)
    assert "confidence" not in plain, "nothing tells how sure it is"
    record = a_record()
    assert record.found is not None
    box_name = BoxName("cat", "tabby", 0.9)
    record.found = replace(record.found, confidence=0.6, box_name=box_name, unsure=True)
    unsure = record.row()
    assert (unsure["label"], unsure["sure"], unsure["boxes"]) == ("cat (tabby)", False, 1)
    record.found = record.found.sure(0.7)
    nothing = record.row()
    assert (nothing["label"], nothing["sure"], nothing["boxes"]) == (None, None, 0)
    assert (nothing["class_name"], nothing["confidence"]) == ("cat", 0.6), "as it always was"
    record.fail(ValueError("lost"))
    assert record.row()["boxes"] is None


def test_several_boxes_are_counted_and_tracked_ones_where_they_are_shown():
    record = a_record()
    assert record.found is not None
    one = Detection((1.0, 2.0, 3.0, 4.0), 0, "cat", 0.5, 0.9)
    record.found = replace(record.found, detections=(one, one, one), confidence=0.9)
    assert record.row()["boxes"] == 3
    track = Track("following", 0.75, 1, None)
    seen = Tracked((1.0, 2.0, 3.0, 4.0), 0, "cat", 0.5, track)
    record.objects = (seen, replace(seen, box_xyxy_px=None))
    assert record.row()["boxes"] == 1


def test_a_row_without_a_class_has_no_score():
    record = a_record()
    assert record.found is not None
    record.found = replace(record.found, class_name=NO_CLASSES[0], score=0.0)
    assert record.row()["score"] is None


def test_every_column_of_a_row_is_in_the_parquet_schema_once():
    names = arrow_schema().names
    assert len(names) == len(set(names))
    assert set(names) == {column.name for column in frames.COLUMNS}


def test_a_new_column_is_one_line(monkeypatch, tmp_path):
    """Added to the table, and nothing else touched, it is in the row, the files and the documents."""
    width = Column("width_px", "int32", lambda r: r.frame.image_bgr.shape[1], "Width of the frame.")
    monkeypatch.setattr(frames, "COLUMNS", (*frames.COLUMNS, width))
    row = a_record().row()
    assert row["width_px"] == 8
    write_rows(iter([row]), tmp_path / "log.jsonl", tmp_path / "log.parquet", lambda _: None)
    assert '"width_px": 8' in (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    assert parquet.read_table(tmp_path / "log.parquet").column("width_px").to_pylist() == [8]
    assert "| `width_px` | int32 | Width of the frame. |" in columns_table()


def test_the_documents_have_the_table_of_columns():
    """``python -m realtime.frames`` prints it."""
    assert columns_table() in BATCH_PAGE.read_text(encoding="utf-8")
