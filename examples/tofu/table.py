"""A table on the disk that grows while a study runs. Part of the studies of TOFU."""

from __future__ import annotations

import csv
from pathlib import Path


class Table:
    """A CSV file that grows by a row at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = list(csv.DictReader(path.open())) if path.exists() else []

    def find(self, **keys: object) -> dict[str, str] | None:
        """The first row with these values."""
        return next((row for row in self.rows if all(row[key] == str(value) for key, value in keys.items())), None)

    def has(self, **keys: object) -> bool:
        return self.find(**keys) is not None

    def add(self, row: dict[str, object]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, row)
            if not self.rows:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append({key: str(value) for key, value in row.items()})
        print(*(f"{key}={value:.3g}" if isinstance(value, float) else value for key, value in row.items()), flush=True)
