"""Folders that other users' programs pass through."""

from pathlib import Path


def make_open(folder: Path) -> None:
    """Make a folder and what is above it, open to others whatever the umask is.

    What is there already stays as it is.
    """
    for one in reversed((folder, *folder.parents)):
        try:
            one.mkdir()
        except FileExistsError:
            continue
        one.chmod(0o755)
