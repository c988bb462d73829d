"""Reads the bodies of requests: one JSON object each, checked against a model."""

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


def reader(model: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """Reads the body of a request: one JSON object with nothing in it twice, and no number that
    JSON does not have.
    """

    async def read(request: Request) -> Model:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, "send application/json")
        try:
            found = json.loads(
                await request.body(), object_pairs_hook=_object, parse_constant=_no_number
            )
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, "the body is no JSON that can be read") from error
        try:
            return model.model_validate(found)
        except ValidationError as error:
            raise HTTPException(
                422, in_words(error.errors(include_input=False, include_url=False))
            ) from error

    return read


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def in_words(errors: Sequence[Any]) -> str:
    """What is wrong with a request, of pydantic's first errors."""
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in errors[:3])
