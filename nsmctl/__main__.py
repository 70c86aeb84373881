"""Starts `nsmctl`: the script on PATH, and `python -P -m nsmctl`."""

from nsmctl import origin  # noqa: F401 - first, because what stands in for `nsm` would be run

# isort: split
from nsmctl import command


def main() -> None:
    """The command's entry."""
    command.main()


if __name__ == "__main__":
    main()
