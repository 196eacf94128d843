"""metrics.csv: every logged value of a stage, one file however often the run was stopped."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from spice_pl.errors import UsageError
from spice_pl.system.files import atomic


class CurveLogger(Logger):
    """Rows of numbers, kept in memory and written whole; a repeated row takes its old place.

    A run that goes on reads the rows of its earlier parts. It may log an epoch that it had logged
    before it was killed, with the same numbers, which then stand once.

    Args:
        save_dir: folder of metrics.csv.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._folder = save_dir
        self._rows: dict[tuple[str, ...], dict[str, str]] | None = None

    @property
    def name(self) -> str:
        """None of its own."""
        return ""

    @property
    def version(self) -> str:
        """None of its own."""
        return ""

    @property
    def save_dir(self) -> str:
        """The stage's folder."""
        return self._folder

    @property
    def rows(self) -> dict[tuple[str, ...], dict[str, str]]:
        """All rows so far, by step and by which values they hold."""
        if self._rows is None:
            self._rows = {}
            if self._file.is_file():
                try:
                    with self._file.open(newline="", encoding="utf-8") as file:
                        for line in csv.DictReader(file):
                            self._put({key: value for key, value in line.items() if value})
                # A damaged table can lack its columns or hold anything in them.
                except (ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
                    raise UsageError(
                        f"{self._file} is damaged ({error}); overwrite=true starts its stage anew"
                    ) from error
        return self._rows

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: .hydra/config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep a row."""
        _ = self.rows
        self._put({key: repr(float(value)) for key, value in metrics.items()} | {"step": str(step)})

    @rank_zero_only
    def save(self) -> None:
        """Write all rows."""
        if not self.rows:
            return
        names = sorted({key for row in self.rows.values() for key in row})
        with atomic(self._file) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows.values())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write all rows."""
        self.save()

    @property
    def _file(self) -> Path:
        return Path(self._folder, "metrics.csv")

    def _put(self, row: dict[str, str]) -> None:
        assert self._rows is not None  # noqa: S101 - `rows` was asked before
        if "epoch" in row:
            row["epoch"] = str(int(float(row["epoch"])))
        self._rows[(row["step"], *sorted(row))] = row
