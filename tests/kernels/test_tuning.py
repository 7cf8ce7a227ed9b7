"""Results of tuning: kept in a file, found by kernel, device, dtype and bucket of sizes, and never in the way."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

import triton

from opweave.errors import ExecutionError
from opweave.kernels import tuning
from opweave.kernels._configs import Config, Configs
from opweave.kernels.tuning import TunedResult, bucket, forget, load, results_file, store, tuned

GPU = torch.device("cuda", 0)
ROW = Config({"block": 64}, num_warps=2)
CONFIGS = Configs("probe", MappingProxyType({90: (ROW,)}), "one")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_device_name", lambda device: "a GPU")
    forget()
    yield
    forget()


def result(**changes: object) -> TunedResult:
    facts = {
        **{"kernel": "probe", "fingerprint": "one", "device": "a GPU", "dtype": "bfloat16"},
        **{"triton": triton.__version__, "sizes": {"rows": 4096}, "constants": {"block": 128}},
        **{"num_warps": 8, "num_stages": 3, "ms": 1.0, "default_ms": 2.0},
    }
    return TunedResult(**{**facts, **changes})


def found(sizes: int = 4000, dtype: torch.dtype | None = torch.bfloat16, configs: Configs = CONFIGS) -> Config | None:
    return tuned(configs, GPU, dtype, {"rows": sizes})


def test_buckets_end_at_powers_of_two() -> None:
    assert bucket({"a": 0, "b": 1, "c": 2, "d": 3, "e": 4096, "f": 4097}) == {
        **{"a": 0, "b": 1, "c": 2, "d": 4},
        **{"e": 4096, "f": 8192},
    }


def test_without_a_file_nothing_is_tuned() -> None:
    assert found() is None
    assert not results_file().exists()


def test_a_result_holds_for_its_bucket() -> None:
    assert store([result()]) == results_file()
    assert found(4096) == found(2049) == Config({"block": 128}, num_warps=8, num_stages=3)
    assert found(2048) is None
    assert found(4097) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel": "another"},
        {"fingerprint": "another version of the kernel"},
        {"device": "another GPU"},
        {"dtype": "float32"},
        {"triton": "1.0"},
        {"sizes": {"rows": 4096, "columns": 8}},
        {"constants": {"block_m": 128}},
    ],
    ids=str,
)
def test_a_result_for_something_else_is_not_taken(changes: dict[str, object]) -> None:
    store([result(**changes)])
    assert found() is None


def test_what_is_not_on_a_gpu_or_of_unknown_dtype_is_not_tuned() -> None:
    store([result()])
    assert found(dtype=None) is None
    assert tuned(CONFIGS, torch.device("cpu"), torch.bfloat16, {"rows": 4000}) is None


def test_launchers_choose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store([result()])
    monkeypatch.setattr("opweave.kernels._configs.architecture_of", lambda device: 90)
    assert CONFIGS.choose(GPU, torch.bfloat16, rows=4000).num_warps == 8
    assert CONFIGS.choose(GPU, torch.float16, rows=4000) is ROW
    assert CONFIGS.choose(GPU, rows=4000) is ROW


def test_later_results_replace_and_others_stay() -> None:
    store([result(), result(dtype="float32")])
    store([result(num_warps=4)])
    assert [(r.dtype, r.num_warps) for r in load(results_file())] == [("bfloat16", 4), ("float32", 8)]
    assert [path.name for path in results_file().parent.iterdir()] == ["tuning.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not JSON",
        "[]",
        '{"version": 1}',
        '{"version": 2, "results": []}',
        '{"version": 1, "results": [{"kernel": "probe"}]}',
        '{"version": 1, "results": [], "more": 1}',
    ],
)
def test_an_unreadable_file_is_warned_of_once_and_ignored(text: str) -> None:
    results_file().parent.mkdir()
    results_file().write_text(text)
    with pytest.warns(RuntimeWarning, match=r"tuning\.json .*ignored"):
        assert found() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found() is None
        assert found(configs=Configs("other", CONFIGS.rows)) is None


@pytest.mark.filterwarnings("ignore:results of tuning:RuntimeWarning")
def test_an_unreadable_file_is_replaced() -> None:
    results_file().parent.mkdir()
    results_file().write_text("not JSON")
    store([result()])
    assert found() is not None
    assert json.loads(results_file().read_text())["version"] == tuning.VERSION


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExecutionError, match="cannot be written"):
        store([result()], tmp_path / "file" / "tuning.json")
