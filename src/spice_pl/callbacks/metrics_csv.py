"""metrics.csv: every logged value of a stage, in one file even if the run was resumed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from spice_pl.errors import UsageError
from spice_pl.system.files import atomic
from spice_pl.system.schema import read_text


class CurveLogger(Logger):
    """Keep rows of numbers in memory and write them to one file.

    A resumed run reads the rows of its earlier parts. It may log an epoch again that it had logged
    before it was killed: a row with the same step and columns replaces the earlier one.

    Args:
        save_dir: folder of metrics.csv.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._folder = save_dir

    @property
    def name(self) -> str:
        """Empty: a stage has one such logger."""
        return ""

    @property
    def version(self) -> str:
        """Empty: a stage has one such logger."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the stage."""
        return self._folder

    @cached_property
    def rows(self) -> dict[tuple[str, ...], dict[str, str]]:
        """All rows so far, by step and columns; at first those in the file, if there is one."""
        rows: dict[tuple[str, ...], dict[str, str]] = {}
        if self._file.is_file():
            try:
                for line in csv.DictReader(io.StringIO(read_text(self._file), newline="")):
                    _put(rows, {key: value for key, value in line.items() if value})
            # A damaged table can lack its columns or hold anything in them.
            except (ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
                raise UsageError(
                    f"{self._file} is damaged ({error}); overwrite=true starts its stage from "
                    "scratch"
                ) from error
        return rows

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: .hydra/config.yaml holds the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep a row."""
        row = {key: repr(float(value)) for key, value in metrics.items()}
        _put(self.rows, row | {"step": str(step)})

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


def _put(rows: dict[tuple[str, ...], dict[str, str]], row: dict[str, str]) -> None:
    if "epoch" in row:
        row["epoch"] = str(int(float(row["epoch"])))
    rows[(row["step"], *sorted(row))] = row
