"""A run's log: a JSON object a step, which a run that goes on continues."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


class Log:
    """Lines that are written as they come; `records` are those of all steps, of before a kill too."""

    def __init__(self, path: Path | None, steps: int) -> None:
        """Keep the lines of the first `steps` steps, as later ones are made again; None: no file."""
        self.records: list[dict[str, Any]] = []
        self._file = None
        if path is None:
            return
        if steps and path.exists():
            lines = path.read_text().splitlines()[:steps]
            self.records = [json.loads(line) for line in lines]
        if len(self.records) != steps:
            raise ValueError(f"{path} must have the {steps} steps of its checkpoint, got {len(self.records)}")
        write(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._file = path.open("a", buffering=1)

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")

    def sync(self) -> None:
        """Put the lines on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def write(path: Path, content: str | bytes) -> None:
    """Write a file that is either the old or the new one, whatever happens on the way."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
