"""What others have published of pipeline schedules, and what their own programs say: figures, each with its source.

Times are in microseconds; bubbles are fractions of the time in which the ranks idle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "DUALPIPE",
    "MEASURED_V",
    "TORCH",
    "UNIT_V",
    "ZERO_BUBBLE",
    "ZERO_BUBBLE_V",
    "Measured",
    "MeasuredV",
    "TorchRow",
    "UnitV",
]


@dataclass(frozen=True)
class Measured:
    """Measured times of F, I and W of a stage and of a transfer, and published bubbles by schedule.

    ``chunks`` are those of interleaved 1F1B: a layer each. ``hidden`` and ``heads`` set how much activations weigh.
    """

    ranks: int
    microbatches: int
    forward: int
    input_gradient: int
    weight_gradient: int
    send: int
    hidden: int
    heads: int
    layers: int
    bubbles: Mapping[str, float]

    @property
    def case(self) -> str:
        """Sizes, as they stand in tables."""
        return f"hidden {self.hidden}, p {self.ranks}, m {self.microbatches}"


_COLUMNS = ("1f1b", "interleaved-1f1b", "zb-h1", "zb-h2", "zb-1p", "zb-2p")
_V_COLUMNS = ("1f1b", "interleaved-1f1b", "zb-h1", "zb-h2", "zb-v")
_SMALL, _MIDDLE, _LARGE, _HUGE = (2304, 24, 24), (4096, 32, 32), (5120, 40, 48), (6144, 48, 64)


def _measured(columns: tuple[str, ...], model: tuple[int, int, int], *line: float) -> Measured:
    ranks, microbatches, forward, input_gradient, weight_gradient, send = (int(value) for value in line[:6])
    bubbles = MappingProxyType(dict(zip(columns, line[6:], strict=True)))
    times = forward, input_gradient, weight_gradient, send
    return Measured(ranks, microbatches, *times, *model, bubbles)


#: Qi et al., arXiv 2401.10241, table of bubble rates (measured on A100); interleaved 1F1B as the authors'
#: ``efficiency.py`` says. The span counts for zb-h2, zb-1p and zb-2p, the makespan for the others.
ZERO_BUBBLE: tuple[Measured, ...] = tuple(
    _measured(_COLUMNS, model, *line)
    for model, line in (
        (_SMALL, (8, 24, 18522, 18086, 9337, 601, 0.2431, 0.1055, 0.1585, 0.1083, 0.1585, 0.0433)),
        (_SMALL, (8, 32, 18513, 18086, 9331, 626, 0.1985, 0.0818, 0.1242, 0.0837, 0.1242, 0.0039)),
        (_SMALL, (8, 64, 18546, 18097, 9321, 762, 0.1240, 0.0443, 0.0674, 0.0444, 0.0674, 0.0026)),
        (_MIDDLE, (8, 24, 29718, 29444, 19927, 527, 0.2347, 0.0808, 0.1323, 0.0698, 0.1323, 0.0029)),
        (_MIDDLE, (8, 32, 29802, 29428, 19530, 577, 0.1898, 0.0628, 0.1045, 0.0559, 0.1045, 0.0022)),
        (_MIDDLE, (8, 64, 29935, 29621, 19388, 535, 0.1091, 0.0320, 0.0554, 0.0294, 0.0554, 0.0010)),
        (_LARGE, (16, 48, 11347, 11248, 8132, 377, 0.2552, 0.1104, 0.1397, 0.0672, 0.1397, 0.0066)),
        (_LARGE, (16, 64, 11307, 11254, 8101, 379, 0.2082, 0.0852, 0.1088, 0.0516, 0.1088, 0.0054)),
        (_LARGE, (16, 128, 11325, 11308, 8109, 378, 0.1251, 0.0445, 0.0576, 0.0266, 0.0576, 0.0028)),
        (_HUGE, (32, 96, 10419, 10207, 7715, 408, 0.2646, 0.1493, 0.1421, 0.0641, 0.1421, 0.0038)),
        (_HUGE, (32, 128, 10408, 10204, 7703, 408, 0.2168, 0.1164, 0.1106, 0.0490, 0.1106, 0.0029)),
        (_HUGE, (32, 256, 10402, 10248, 7698, 460, 0.1352, 0.0624, 0.0594, 0.0257, 0.0594, 0.0018)),
    )
)

#: The table of arXiv 2401.10241 v1 with ZB-V; times are of a chunk, half a rank's layers.
ZERO_BUBBLE_V: tuple[Measured, ...] = tuple(
    _measured(_V_COLUMNS, model, *line)
    for model, line in (
        (_MIDDLE, (16, 48, 14407, 14380, 9676, 1610, 0.2668, 0.1499, 0.1536, 0.0823, 0.0697)),
        (_MIDDLE, (16, 64, 14412, 14393, 9688, 1621, 0.2206, 0.1169, 0.1198, 0.0630, 0.0533)),
        (_MIDDLE, (16, 128, 14316, 14306, 9639, 1619, 0.1390, 0.0621, 0.0637, 0.0325, 0.0274)),
        (_LARGE, (24, 72, 6763, 6969, 5251, 755, 0.2699, 0.1519, 0.1439, 0.0628, 0.0638)),
        (_LARGE, (24, 96, 6783, 6984, 5259, 758, 0.2229, 0.1184, 0.1121, 0.0480, 0.0483)),
        (_LARGE, (24, 192, 6785, 6990, 5260, 770, 0.1403, 0.0630, 0.0595, 0.0247, 0.0250)),
        (_HUGE, (32, 96, 9458, 9748, 7288, 879, 0.2676, 0.1509, 0.1429, 0.0629, 0.0593)),
        (_HUGE, (32, 128, 9469, 9744, 7306, 892, 0.2204, 0.1177, 0.1111, 0.0478, 0.0451)),
        (_HUGE, (32, 256, 9447, 9644, 7193, 887, 0.1362, 0.0626, 0.0593, 0.0251, 0.0236)),
    )
)


@dataclass(frozen=True)
class UnitV:
    """F, I and W of a chunk take 1, transfers nothing. Peaks are in activations of a chunk; 1F1B holds ``2 p``.

    ZB-V: bubble of makespan and of span; the others': of the makespan.
    """

    ranks: int
    microbatches: int
    one_forward: float
    zero_bubble: tuple[float, float, int]
    half: tuple[float, int]
    least: tuple[float, int]


#: What the authors' generators of arXiv 2405.15362 (ZB-V: of 2401.10241) make, scored in another simulator than ours.
UNIT_V: tuple[UnitV, ...] = (
    UnitV(4, 8, 0.2727, (0.0588, 0.0, 8), (0.0943, 6), (0.1864, 4)),
    UnitV(4, 12, 0.2000, (0.0400, 0.0, 8), (0.0649, 6), (0.1325, 4)),
    UnitV(4, 16, 0.1579, (0.0303, 0.0, 8), (0.0495, 6), (0.1028, 4)),
    UnitV(8, 16, 0.3043, (0.0680, 0.0, 16), (0.1504, 10), (0.2195, 8)),
    UnitV(8, 24, 0.2258, (0.0464, 0.0, 16), (0.1056, 10), (0.1579, 8)),
    UnitV(8, 32, 0.1795, (0.0352, 0.0, 16), (0.0813, 10), (0.1233, 8)),
    UnitV(16, 32, 0.3191, (0.0725, 0.0, 32), (0.1760, 18), (0.2351, 12)),
    UnitV(16, 48, 0.2381, (0.0495, 0.0, 32), (0.1246, 18), (0.1700, 12)),
    UnitV(16, 64, 0.1899, (0.0376, 0.0, 32), (0.0965, 18), (0.1332, 12)),
)


@dataclass(frozen=True)
class MeasuredV:
    """The same of measured times of a chunk; ZB-V made from the times: bubble of makespan and of span."""

    ranks: int
    microbatches: int
    forward: int
    input_gradient: int
    weight_gradient: int
    send: int
    zero_bubble: tuple[float, float]
    half: float
    least: float


MEASURED_V: tuple[MeasuredV, ...] = (
    MeasuredV(8, 24, 14859, 14722, 9963, 527, (0.0606, 0.0403), 0.1447, 0.2721),
    MeasuredV(16, 48, 14407, 14380, 9676, 1610, (0.0836, 0.0697), 0.1847, 0.3300),
    MeasuredV(24, 72, 6763, 6969, 5251, 755, (0.0922, 0.0638), 0.1823, 0.3158),
    MeasuredV(32, 96, 9458, 9748, 7288, 879, (0.0868, 0.0593), 0.1810, 0.3110),
)


@dataclass(frozen=True)
class TorchRow:
    """A schedule of PyTorch 2.13, its own order scored in another simulator than ours.

    Bubbles of the makespan by sizes, F, I and W of a chunk taking 1, and of p 8, m 16 with measured times; peaks at p 4
    and p 8 in microbatches of a whole rank, ``None`` where it is all of them.
    """

    name: str
    chunks: int
    bubbles: Mapping[tuple[int, int], float]
    peaks: tuple[float, float] | None
    measured: float
    measured_span: float | None = None


def _torch(name: str, chunks: int, bubbles: str, peaks: tuple[float, float] | None, *measured: float) -> TorchRow:
    sizes = ((4, 8), (4, 16), (8, 16), (8, 32))
    by_size = dict(zip(sizes, map(float, bubbles.split()), strict=True))
    return TorchRow(name, chunks, MappingProxyType(by_size), peaks, *measured)


TORCH: tuple[TorchRow, ...] = (
    _torch("gpipe", 1, "0.2727 0.1579 0.3043 0.1795", None, 0.3072),
    _torch("1f1b", 1, "0.2727 0.1579 0.3043 0.1795", (4, 8), 0.3123),
    _torch("interleaved-1f1b", 2, "0.1579 0.0857 0.1795 0.0986", (5.5, 11.5), 0.1878),
    _torch("breadth-first", 2, "0.1579 0.0857 0.1795 0.0986", None, 0.1834),
    _torch("interleaved-zb", 2, "0.0588 0.0303 0.0680 0.0352", (4, 8), 0.1099),
    _torch("zbv", 2, "0.0588 0.0303 0.0680 0.0352", (4, 8), 0.0875, 0.0654),
    _torch("dualpipe-v", 2, "0.0588 0.0303 0.0680 0.0352", (4.5, 8.5), 0.1073),
)

#: Busy time, makespan, and idle time of the official order of steps, F, I and W taking 1, all in turn; by schedule and
#: sizes. From a review of deepseek-ai/DualPipe by others, not its authors.
DUALPIPE: Mapping[tuple[str, int, int], tuple[int, int, int]] = MappingProxyType(
    {
        ("dualpipe", 4, 10): (30, 31, 1),
        ("dualpipe", 8, 20): (60, 63, 3),
        ("dualpipe-v", 4, 10): (60, 63, 3),
        ("dualpipe-v", 8, 20): (120, 127, 7),
    }
)
