"""How do a run's rows become tables? csv/train.csv, evaluation.csv, sample.csv and event.csv in the run's folder."""

import csv
import io
import os
from pathlib import Path

from training.log_to import LoggedRun, Row


class Logger:
    """A file for each kind of row. A row with a new column has the file written anew, which is rare."""

    takes_back = True
    kept: str | None = None

    def __init__(self, run: LoggedRun) -> None:
        self._folder = run.folder / "csv"
        self._folder.mkdir(exist_ok=True)
        self._columns: dict[str, list[str]] = {}
        for path in self._folder.glob("*.csv"):
            columns, rows = read_table(path)
            self._columns[path.stem] = columns
            _write_table(path, columns, [row for row in rows if int(row["step"]) <= run.step])

    def log(self, kind: str, row: Row) -> None:
        path, columns = self._folder / f"{kind}.csv", self._columns.get(kind, [])
        if new := [name for name in row if name not in columns]:
            rows = read_table(path)[1] if columns else []
            self._columns[kind] = [*columns, *new]
            _write_table(path, self._columns[kind], rows)
        with open(path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns[kind]).writerow(row)

    def close(self, failed: bool) -> None:
        """Every row is in its file already."""


def read_table(path: Path) -> tuple[list[str], list[Row]]:
    """(columns, whole rows, as texts); a last row that a crash cut is left out."""
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\r\n") + 2] if "\r\n" in text else ""
    table = csv.DictReader(io.StringIO(whole, newline=""))
    return list(table.fieldnames or []), list(table)


def _write_table(path: Path, columns: list[str], rows: list[Row]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)
    os.replace(temporary, path)
