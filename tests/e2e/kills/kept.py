"""What was said while a row was struck: kept of a red one, because its lab is gone afterwards."""

import os
import time
from pathlib import Path
from typing import Final

from labs.paths import Paths

MOST: Final = 64 << 10  # bytes of one file: the last of what it got


class Said:
    """The files into which a lab's processes write, from now on."""

    def __init__(self, paths: Paths) -> None:
        self._folder = Path(paths.folder)
        self._began = time.time()
        self._sizes = {path: os.path.getsize(path) for path in self._files()}

    def _files(self) -> list[Path]:
        found = [self._folder / "processes.jsonl", self._folder / "faults.json"]
        for folder in ("log", "status"):
            found += sorted((self._folder / folder).glob("*"))
        return [path for path in found if path.is_file()]

    def keep(self, into: Path, why: str) -> None:
        """All that was written since, one file after the other in one."""
        into.parent.mkdir(parents=True, exist_ok=True)
        with into.open("wb") as out:
            out.write(f"struck at {self._began:.3f}\n{why}\n".encode())
            for path in self._files():
                since = self._sizes.get(path, 0)
                size = path.stat().st_size
                with path.open("rb") as file:
                    # a log that was cut meanwhile is shorter; what is told anew is all of it
                    file.seek(max(since if since <= size else 0, size - MOST))
                    if text := file.read(MOST):
                        out.write(f"\n==> {path.relative_to(self._folder)} <==\n".encode() + text)
