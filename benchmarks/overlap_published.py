"""What others have published of compute that overlaps communication: figures, each with its source.

Times are in milliseconds unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "FIG9_OFFSETS",
    "FIG9_US",
    "FLUX_AG_GEMM",
    "FLUX_GEMM_RS",
    "FSMOE_LAYER_SPEEDUP",
    "LENGTHS",
    "NANOFLOW_ABLATION",
    "NANOFLOW_ESTIMATED",
    "NANOFLOW_MEASURED",
    "PR_143160_US",
    "T3_SPEEDUPS",
    "TOKENWEAVE",
    "Prefill",
]

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class Prefill:
    """Latencies by length: with all-reduces as they come, without communication, and overlapped; and the source."""

    baseline: tuple[float, ...]
    free: tuple[float, ...]
    overlapped: tuple[float, ...]
    source: str


_ARTIFACT = "microsoft/tokenweave artifact/csvs/figure_11a.csv (arXiv 2505.11329)"
_RERUN = "microsoft/tokenweave artifacts_results/output/figure_2_11_summary.csv"
#: By model and number of ranks, on H100 SXM with NVSwitch; the baseline's all-reduces are multimem kernels.
TOKENWEAVE: Mapping[tuple[str, int], Prefill] = MappingProxyType(
    {
        ("Llama-3.3-70B", 8): Prefill(
            (53.66, 94.23, 179.48, 356.02, 744.11, 1639.86, 3917.74),
            (41.94, 74.92, 144.90, 289.55, 610.22, 1371.36, 3338.34),
            (46.16, 76.73, 142.23, 279.76, 585.34, 1326.04, 3282.36),
            _ARTIFACT,
        ),
        ("Qwen2.5-72B", 8): Prefill(
            (54.27, 97.05, 183.34, 358.48, 754.61, 1656.13, 3977.56),
            (42.47, 77.77, 149.09, 292.64, 624.04, 1393.44, 3410.28),
            (47.64, 79.01, 146.70, 288.43, 607.88, 1368.79, 3219.79),
            _ARTIFACT,
        ),
        ("Mixtral-8x22B", 8): Prefill(
            (42.94, 68.16, 121.36, 230.65, 470.99, 1024.03, 2383.09),
            (36.42, 57.12, 102.21, 195.63, 405.14, 891.27, 2109.83),
            (69.14, 69.89, 107.71, 199.44, 399.22, 874.91, 2104.19),
            _ARTIFACT,
        ),
        ("Llama-3.3-70B", 4): Prefill(
            (81.89, 150.70, 295.22, 609.82, 1290.57, 2881.34, 7061.26),
            (70.63, 134.68, 262.50, 543.93, 1155.52, 2597.96, 6459.39),
            (72.61, 136.82, 261.97, 529.65, 1128.53, 2568.56, 6380.64),
            _RERUN,
        ),
        ("Qwen2.5-72B", 4): Prefill(
            (82.70, 155.95, 297.73, 620.45, 1312.05, 2932.40, 6861.61),
            (72.61, 139.75, 265.75, 556.90, 1181.05, 2660.96, 6296.29),
            (74.35, 139.98, 271.86, 536.21, 1159.93, 2636.81, 6487.84),
            _RERUN,
        ),
        ("Qwen3-235B-A22B", 8): Prefill(
            (62.10, 92.44, 150.90, 283.36, 577.15, 1293.79, 3289.23),
            (58.17, 80.89, 126.10, 235.28, 480.51, 1104.45, 2906.52),
            (60.89, 128.61, 157.69, 254.98, 500.30, 1124.13, 2937.64),
            "microsoft/tokenweave artifact/csvs/figure_qwen3moe_summary.csv; not split at 1024",
        ),
    }
)

FIG9_OFFSETS = (0, 64, 128, 192, 256)
#: TokenWeave, figure 9 (artifacts_results/output/figure_9_hs_8192.csv): microseconds of Llama-70B's MLP on one of 8
#: ranks by tokens; whole, and in two parts, the first of which has half the tokens and an offset more.
FIG9_US: Mapping[int, tuple[float, tuple[float, ...]]] = MappingProxyType(
    {
        1024: (305.5, (316.4, 384.4, 384.6, 400.8, 358.7)),
        1280: (369.7, (455.5, 474.0, 399.8, 445.5, 445.2)),
        1536: (434.1, (484.9, 535.6, 515.5, 530.8, 463.0)),
        1792: (496.0, (572.8, 588.4, 541.9, 591.8, 574.3)),
        2048: (562.5, (604.4, 645.8, 632.4, 653.2, 610.2)),
        2304: (623.3, (695.8, 717.4, 672.9, 715.4, 699.6)),
        2560: (686.3, (742.5, 782.7, 760.4, 782.2, 738.4)),
        2816: (747.8, (820.6, 842.1, 802.5, 841.4, 819.8)),
        3072: (815.7, (867.5, 905.1, 884.4, 902.7, 865.1)),
        3328: (877.1, (951.9, 968.7, 933.5, 933.1, 911.3)),
        3584: (870.4, (993.5, 990.0, 975.7, 1031.2, 992.8)),
        3840: (961.0, (994.5, 1051.3, 1051.9, 1068.6, 1050.9)),
    }
)

#: NanoFlow (arXiv 2408.12757v2), table 2: Llama-2-70B, 2048 tokens in a batch on 8 A100; at its roofline, and measured.
NANOFLOW_ESTIMATED: Mapping[str, float] = MappingProxyType(
    {"KQV": 11.01, "O": 8.81, "UG": 61.67, "D": 30.84, "decode attention": 28.89, "network": 31.33}
)
NANOFLOW_MEASURED: Mapping[str, float] = MappingProxyType(
    {"KQV": 16.08, "O": 16.01, "UG": 69.92, "D": 34.96, "decode attention": 35.60, "network": 47.92}
)
#: The same, figure 9: tokens per second and GPU with 512 tokens in and 512 out.
NANOFLOW_ABLATION: Mapping[str, float] = MappingProxyType(
    {"non-overlapped": 1106.0, "nano-batches only": 982.0, "NanoFlow": 1323.0}
)

#: FSMoE (arXiv 2501.10714, ASPLOS 2025): mean speed-up of a layer over Tutel on 32 RTX 2080 Ti.
FSMOE_LAYER_SPEEDUP = 1.22

#: T3 (arXiv 2401.16677, ASPLOS 2024), motivation: a product with its reduce-scatter beside it, by the compute units
#: that the collective has (0: the ideal, for which nothing slows down).
T3_SPEEDUPS: Mapping[int, float] = MappingProxyType({0: 1.67, 8: 1.18, 16: 1.49})

#: bytedance/flux issue 90 (a user's, 8 H100): by rows, torch and flux. Columns and inner sizes are read off the file
#: names: all-gather, then 8192 to 57344 / 8; and 28672 / 8 to 8192, then reduce-scatter.
FLUX_AG_GEMM: Mapping[int, tuple[float, float]] = MappingProxyType(
    {
        1024: (0.24725, 0.25),
        2048: (0.454, 0.426),
        4096: (0.867, 0.673),
        8192: (1.692, 1.315),
        16384: (3.387, 2.804),
        32768: (6.831, 5.819),
    }
)
FLUX_GEMM_RS: Mapping[int, tuple[float, float]] = MappingProxyType(
    {
        1024: (0.18, 0.183),
        2048: (0.2895, 0.331),
        4096: (0.542, 0.633),
        8192: (1.04, 1.241),
        16384: (2.011, 2.459),
        32768: (3.978, 4.986),
    }
)

#: pytorch/pytorch pull request 143160 (its author's): microseconds of an all-gather and a product of 2048 x 8192 with
#: 8192 x 3584, on 8 H100.
PR_143160_US: Mapping[str, float] = MappingProxyType({"NCCL": 301.0, "decomposed": 354.0, "multimem": 277.0})
