"""The files that a run leaves: rows as JSON and CSV while it measures, pictures and the page at its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .figures import COLUMNS, Comparison, lines_of
from .html import page
from .providers import OURS
from .rows import Row, document, dumped, make_folder, write_csv, write_whole

__all__ = ["Results"]


class Results:
    """What was measured so far, in a folder; every case that is added is on the disk before the next one begins."""

    def __init__(self, folder: Path | None) -> None:
        self.head = document("kernels")
        self.rows: list[Row] = []
        self.left_out: dict[str, str] = {}
        self.folder = folder
        if folder is not None:
            make_folder(folder)

    def add(self, rows: Iterable[Row]) -> None:
        """Keep rows, and write all there are."""
        self.rows += rows
        if self.folder is not None:
            write_whole(self.folder / "kernels.json", dumped(self._whole_head(), self.rows))
            write_csv(self.folder / "kernels.csv", COLUMNS, (line.cells for line in lines_of(self.rows)))

    def leave_out(self, case: str, what: Sequence[str]) -> None:
        """Note what there was no time for."""
        if what:
            self.left_out[case] = ", ".join(what)

    def _whole_head(self) -> dict[str, object]:
        return {**self.head, "left_out": self.left_out}

    def finish(self, comparisons: Sequence[Comparison] = ()) -> list[Path]:
        """Draw, and write the page. Returns the files."""
        if self.folder is None:
            return []
        from .pictures import kernel_picture, roofline_picture

        self.add(())
        lines = lines_of(self.rows)
        dtypes = [line.parts[2] for line in lines if line["ms"] and line.least_ms]
        pictures: dict[str, bytes] = {}
        if dtypes:
            most = max(dict.fromkeys(dtypes), key=dtypes.count)
            pictures["roofline"] = roofline_picture(self.rows, lines, most, OURS)
        for kernel in dict.fromkeys(line.parts[0] for line in lines if line["ms"]):
            pictures[kernel] = kernel_picture(kernel, lines)
        for name, data in pictures.items():
            (self.folder / f"{name}.png").write_bytes(data)
        text = page(self.head, self.rows, lines, pictures, comparisons, self.left_out)
        write_whole(self.folder / "index.html", text)
        names = ("index.html", "kernels.json", "kernels.csv", *(f"{name}.png" for name in pictures))
        return [self.folder / name for name in names]
