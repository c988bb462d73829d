"""What is asked of a batch, and what of it decides the results."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from engines.localizer import Localizer
from realtime.batch.plan import Window
from realtime.governed import Governed

FORMAT = 1
"""Of segments and manifests; what an older one left is done again."""


@dataclass(frozen=True)
class Settings:
    """See ``realtime.batch.run.process_all``.

    Attributes:
        video: write the annotated video.
        heat_video: write a video with the heat map over the frames.
        every: only frames whose number is a multiple of it.
        start_s, end_s: the part that is wanted, in seconds since the first frame.
    """

    video: bool = True
    heat_video: bool = False
    every: int = 1
    start_s: float = 0.0
    end_s: float | None = None

    @property
    def window(self) -> Window:
        """The part that is wanted."""
        return Window(self.start_s, self.end_s)


def settings_digest(settings: Settings, localizer: Localizer | Governed) -> str:
    """Of everything but the source that decides the results: two runs with the same give the same files.

    The processor is not among it, nor are threads.
    """
    decides: dict[str, Any] = {"format": FORMAT, **asdict(settings), "engine": localizer.description}
    if isinstance(localizer, Localizer):
        engine = localizer.engine
        decides |= {"backend": engine.backend, "precision": engine.precision, "batch": localizer.batch}
    decides["wanted_class"] = localizer.wanted_class
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=20).hexdigest()
