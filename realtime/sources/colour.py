"""Turns a decoder's picture into upright 8-bit BGR with ordinary colours.

High dynamic range (PQ, HLG) and wide gamut (BT.2020) become BT.709 as an ordinary screen shows it,
through one table.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
from av.filter import Graph
from av.filter.context import FilterContext
from av.sidedata.sidedata import SideData, Type
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from engines.localizer import ImageBgr

PQ, HLG = 16, 18  # transfer characteristics, ITU-T H.273, table 3
BT2020_PRIMARIES = 9
BT709 = {"space": 1, "range": 1, "primaries": 1, "transfer": 1}
"""What converted pictures are, as in ``Clip.colour``."""
WHITE_NITS, PEAK_NITS = (
    203.0,
    1000.0,
)  # ITU-R BT.2408: of paper, and of what most films are made for
KNEE = 0.5  # of white, linear: darker ones stay as they are, brighter ones are pressed together
GAMMA = 2.4  # ITU-R BT.1886
TABLE_SIDE = 33
TO_BT709 = np.array(
    [
        [1.660491, -0.587641, -0.072850],
        [-0.124550, 1.132900, -0.008349],
        [-0.018151, -0.100579, 1.118730],
    ]
)
"""Linear RGB of BT.2020 to BT.709 (ITU-R BT.2087)."""
Floats = NDArray[np.float64]


def is_mapped(picture: av.VideoFrame) -> bool:
    """Whether its colours are others than an ordinary screen shows."""
    return (
        int(picture.color_trc or 0) in (PQ, HLG)
        or int(picture.color_primaries or 0) == BT2020_PRIMARIES
    )


class ToBgr:
    """Converts pictures; keep one for all of a decoder's, as setting up takes far longer than the
    work.
    """

    def __init__(self) -> None:
        self._reformat, self._key = VideoReformatter(), tuple[object, ...]()
        self._ends: tuple[FilterContext, FilterContext] | None = None
        self._graph: Graph | None = None

    def __call__(self, picture: av.VideoFrame) -> ImageBgr:
        """uint8 BGR ``[height, width, 3]``, turned as the file's display matrix says."""
        converted = self._mapped(picture) if is_mapped(picture) else picture
        pixels = self._reformat.reformat(converted, format="bgr24", threads=1).to_ndarray()
        return upright(np.asarray(pixels, np.uint8), picture)

    def _mapped(self, picture: av.VideoFrame) -> av.VideoFrame:
        space, full = int(picture.colorspace), int(picture.color_range or 0)
        key = (
            picture.format.name,
            picture.width,
            picture.height,
            space,
            full,
            picture.color_trc,
            picture.color_primaries,
        )
        if key != self._key:
            self._key = key
            self._ends = self._set_up(picture, space, full)
        assert self._ends is not None
        self._ends[0].push(picture)
        found = self._ends[1].pull()
        assert isinstance(found, av.VideoFrame)
        return found

    def _set_up(
        self, picture: av.VideoFrame, space: int, full: int
    ) -> tuple[FilterContext, FilterContext]:
        self._graph = graph = Graph()
        shape = f"video_size={picture.width}x{picture.height}:pix_fmt={picture.format.name}"
        given = graph.add("buffer", f"{shape}:time_base=1/90000:colorspace={space}:range={full}")
        taken = graph.add("buffersink")
        with TemporaryDirectory(prefix="sightline-") as folder:
            path = Path(folder) / "colours.cube"
            path.write_text(
                cube(int(picture.color_trc or 0), int(picture.color_primaries or 0)),
                encoding="ascii",
            )
            steps = [
                graph.add("format", "gbrp16le"),
                graph.add("lut3d", f"file={path.as_posix()}:interp=tetrahedral"),
                graph.add("format", "bgr24"),
            ]
            for before, behind in zip([given, *steps], [*steps, taken], strict=True):
                before.link_to(behind)
            graph.configure()
        return given, taken


def upright(pixels: ImageBgr, picture: av.VideoFrame) -> ImageBgr:
    """Turned and mirrored as its display matrix says (ISO 14496-12, 8.3.2), to the nearest quarter
    turn.
    """
    matrix: SideData | None = picture.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]
    if matrix is None:
        return np.ascontiguousarray(pixels)
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        across, down = a, d
    else:
        pixels = pixels.transpose(1, 0, 2)
        across = c
        down = b
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


def is_on_its_side(picture: av.VideoFrame) -> bool:
    """Whether its width is its height when it is upright."""
    return bool(upright(np.empty((2, 1, 3), np.uint8), picture).shape[0] == 1)


def cube(transfer: int, primaries: int) -> str:
    """The table, as a ``.cube`` file."""
    steps = np.linspace(0, 1, TABLE_SIDE)
    blue, green, red = np.meshgrid(steps, steps, steps, indexing="ij")  # red changes first
    rows = to_bt709(np.stack([red, green, blue], axis=-1).reshape(-1, 3), transfer, primaries)
    return f"LUT_3D_SIZE {TABLE_SIDE}\n" + "".join(f"{r:.6f} {g:.6f} {b:.6f}\n" for r, g, b in rows)


def to_bt709(signal: Floats, transfer: int, primaries: int) -> Floats:
    """RGB as coded, ``[n, 3]`` of 0 to 1, to RGB of BT.709 for a screen of ``GAMMA``."""
    linear = {PQ: _pq_linear, HLG: _hlg_linear}.get(transfer, _sdr_linear)(signal)
    if primaries == BT2020_PRIMARIES or transfer in (PQ, HLG):
        linear = linear @ TO_BT709.T
    linear = np.maximum(linear, 0)
    if transfer in (PQ, HLG):
        brightest = linear.max(axis=1, keepdims=True)
        linear *= _rolled_off(brightest) / np.maximum(brightest, 1e-9)
    found: Floats = np.clip(linear, 0, 1) ** (1 / GAMMA)
    return found


def _pq_linear(signal: Floats) -> Floats:
    """SMPTE ST 2084, equation 4.1; 1 is white."""
    power = signal ** (32 / 2523)
    nits: Floats = 10000 * (
        np.maximum(power - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * power)
    ) ** (16384 / 2610)
    return nits / WHITE_NITS


def _hlg_linear(signal: Floats) -> Floats:
    """ITU-R BT.2100, table 5: the inverse OETF, and the OOTF of a screen of ``PEAK_NITS``; 1 is
    white.
    """
    a = 0.17883277
    b = 0.28466892
    c = 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593])
    found: Floats = PEAK_NITS / WHITE_NITS * scene * np.maximum(luminance, 1e-9)[:, None] ** 0.2
    return found


def _sdr_linear(signal: Floats) -> Floats:
    found: Floats = signal**GAMMA
    return found


def _rolled_off(linear: Floats) -> Floats:
    """Above the knee Reinhard's curve with a white point: as steep as before at the knee, 1 at the
    peak.
    """
    over, most = (linear - KNEE) / (1 - KNEE), (PEAK_NITS / WHITE_NITS - KNEE) / (1 - KNEE)
    return np.where(
        linear <= KNEE,
        linear,
        KNEE + (1 - KNEE) * over * (1 + over / most**2) / (1 + np.maximum(over, 0)),
    )
