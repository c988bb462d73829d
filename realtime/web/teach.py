"""The addresses of the page that teach: frames held still, labels, and heads that are fitted."""

from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from realtime.teaching.labels import Box
from realtime.teaching.teacher import Held, Teacher
from realtime.web.bodies import reader

Edge = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Key = Annotated[str, Field(min_length=1, max_length=300)]
Name = Annotated[str, Field(max_length=400)]
Place = Annotated[float | None, Query(allow_inf_nan=False)]


class Strict(BaseModel):
    """A body with nothing else in it."""

    model_config = ConfigDict(extra="forbid")


class Freeze(Strict):
    """Hold the newest frame of a source, or look at one that is held or labelled."""

    source: Name | None = None
    key: Key | None = None


class NamedBox(Strict):
    """A box in pixels of the frame, and its name."""

    name: Name
    box: tuple[Edge, Edge, Edge, Edge]


class Saved(Strict):
    """The boxes of a frame; none: nothing is in it."""

    key: Key
    boxes: Annotated[list[NamedBox], Field(max_length=200)]


class Removed(Strict):
    """The frame whose labels are to be forgotten."""

    key: Key


class Learn(Strict):
    """Whether to use a head that is worse."""

    even_if_worse: bool = Field(default=False, strict=True)


class Use(Strict):
    """Which head to use: the taught one, or the one from before."""

    taught: bool = Field(strict=True)


class Keep(Strict):
    """The name to keep the taught head by."""

    name: Name


class Nothing(Strict):
    """A body without anything in it."""


def add_teaching(app: FastAPI, teacher: Teacher) -> None:
    """Add the addresses to an application."""
    _add_labels(app, teacher)
    _add_learning(app, teacher)


def _add_labels(app: FastAPI, teacher: Teacher) -> None:
    @app.get("/teach")
    def state(is_open: bool = Query(False, alias="open")) -> dict[str, Any]:
        """What is labelled, what to label next, and how learning goes on."""
        if is_open:
            teacher.opened()
        return teacher.state()

    @app.post("/teach/freeze")
    def freeze(wanted: Annotated[Freeze, Depends(reader(Freeze))]) -> dict[str, Any]:
        if wanted.key is not None:
            return _frame(teacher, teacher.look_at(wanted.key))
        return _frame(teacher, teacher.freeze(wanted.source or ""))

    @app.get("/teach/frame.jpg")
    def frame(key: Annotated[str, Query(max_length=300)]) -> Response:
        return Response(teacher.held(key).jpeg, media_type="image/jpeg")

    @app.get("/teach/thumb.jpg")
    def thumb(key: Annotated[str, Query(max_length=300)]) -> Response:
        return Response(teacher.thumb(key), media_type="image/jpeg")

    @app.get("/teach/map.jpg")
    def map_over(key: Annotated[str, Query(max_length=300)]) -> Response:
        return Response(teacher.map_over(key), media_type="image/jpeg")

    @app.get("/teach/why")
    def why(
        key: Annotated[str, Query(max_length=300)],
        x0: Place = None,
        y0: Place = None,
        x1: Place = None,
        y1: Place = None,
    ) -> dict[str, Any]:
        """Why a frame has its answer; with four edges, what lies in that box of it."""
        if x0 is None or y0 is None or x1 is None or y1 is None:
            return teacher.why(key)
        return teacher.why(key, (x0, y0, x1, y1))

    @app.get("/teach/coco.json")
    def coco() -> dict[str, Any]:
        return teacher.labels.coco()

    @app.post("/teach/save")
    def save(wanted: Annotated[Saved, Depends(reader(Saved))]) -> dict[str, Any]:
        boxes = [Box(each.name, each.box) for each in wanted.boxes]
        return _frame(teacher, teacher.save(wanted.key, boxes))

    @app.post("/teach/remove")
    def remove(wanted: Annotated[Removed, Depends(reader(Removed))]) -> dict[str, Any]:
        teacher.remove(wanted.key)
        return _frame(teacher, teacher.held(wanted.key))

    @app.post("/teach/undo")
    def undo(_: Annotated[Nothing, Depends(reader(Nothing))]) -> dict[str, Any]:
        return _frame(teacher, teacher.undo())


def _add_learning(app: FastAPI, teacher: Teacher) -> None:
    @app.post("/teach/learn")
    def learn(wanted: Annotated[Learn, Depends(reader(Learn))]) -> dict[str, Any]:
        teacher.learn(wanted.even_if_worse)
        return teacher.state()

    @app.post("/teach/stop")
    def stop(_: Annotated[Nothing, Depends(reader(Nothing))]) -> dict[str, Any]:
        teacher.stop()
        return teacher.state()

    @app.post("/teach/use")
    def use(wanted: Annotated[Use, Depends(reader(Use))]) -> dict[str, Any]:
        teacher.use(wanted.taught)
        return teacher.state()

    @app.post("/teach/keep")
    def keep(wanted: Annotated[Keep, Depends(reader(Keep))]) -> dict[str, Any]:
        teacher.keep(wanted.name)
        return teacher.state()


def _frame(teacher: Teacher, held: Held) -> dict[str, Any]:
    """A frame as the page shows it: its size, what was found in it, and its labels."""
    boxes = teacher.boxes_of(held)
    return {
        "key": held.key,
        "width": held.size_px[0],
        "height": held.size_px[1],
        "drafts": [
            {"name": each.name, "box": each.box_xyxy_px, "confidence": each.confidence}
            for each in held.drafts
        ],
        "boxes": [{"name": each.name, "box": each.box_xyxy_px} for each in boxes or ()],
        "labelled": boxes is not None,
    }
