"""What is watched and steered while a run goes on."""

import pytest

from engines.errors import InputError, ModelError
from tests.realtime.media import write_video
from tests.realtime.watched import Watched


def test_what_is_looked_for_and_drawn_changes_while_it_runs(tmp_path):
    video = str(write_video(tmp_path / "clip.mp4", 500))
    with Watched(video) as run:
        assert run.session.needs_picture is False
        first = run.session.wait_newer("clip")
        assert first.record.found.class_name == "thing"
        run.session.look_for("other")
        run.session.change(heat_map="off")
        later = run.session.wait_newer("clip", first.number + 3)
        assert later.record.found.class_name == "other"
        corner = (slice(-24, -6), slice(-32, -6))
        assert first.picture[corner].std() > 5
        assert later.picture[corner].std() < 3, "the heat map is gone"
        assert run.session.snapshot("clip")[:2] == b"\xff\xd8"
        with pytest.raises(ModelError, match="unknown to this network"):
            run.session.look_for("yeti")
        with pytest.raises(InputError, match="alpha goes from 0 to 1, not 2"):
            run.session.change(alpha=2)
        run.session.look_for(None)
        assert (
            run.session.wait_newer(
                "clip", run.session.newest("clip").number + 3
            ).record.found.class_name
            == "thing"
        )
        assert run.session.rolling()["sources"]["clip"]["fps"] > 0
    assert run.session.wait_newer("clip", 10**6, timeout_s=60) is None, (
        "nothing comes after the end, and nobody waits for it"
    )
