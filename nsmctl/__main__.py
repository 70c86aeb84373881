"""Starts `nsmctl`: the script on PATH, and `python -P -m nsmctl`."""

import os
import sys
from importlib.util import find_spec

MACHINE_CANNOT = 3  # exit code


def main() -> None:
    """The command's entry."""
    home = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    own = os.path.join(home, "nsm", "__init__.py")
    found = find_spec("nsm")
    if found is None or os.path.realpath(found.origin or "") != own:
        where = (found.origin or f"{list(found.submodule_search_locations or ())}") if found else ""
        sys.stderr.write(
            f"the module 'nsm' comes from {where or 'nowhere'}, not from vwire in {home}\n"
            "  take what shadows it off PYTHONPATH, or install vwire again\n"
        )
        sys.exit(MACHINE_CANNOT)
    # not before: what stands in for `nsm` would be run
    from nsmctl import command

    command.main()


if __name__ == "__main__":
    main()
