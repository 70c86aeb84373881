"""Refuses an `nsm` that is not ours, before it is run: the first import of every program.

The same file in each of them, by links, because as long as `nsm` may be a stranger's there is
no other place that all of them can trust. `nsm.process.origins` looks at the rest.
"""

import os
import sys
from importlib.util import find_spec

MACHINE_CANNOT = 3  # exit code


def _check() -> None:
    home = os.path.abspath(__file__)
    for _ in range(__name__.count(".") + 1):
        home = os.path.dirname(home)
    home = os.path.realpath(home)
    own = os.path.join(home, "nsm", "__init__.py")
    found = find_spec("nsm")
    if found is None or os.path.realpath(found.origin or "") != own:
        where = (found.origin or f"{list(found.submodule_search_locations or ())}") if found else ""
        sys.stderr.write(
            f"the module 'nsm' comes from {where or 'nowhere'}, not from vwire in {home}\n"
            "  take what shadows it off PYTHONPATH, or install vwire again\n"
        )
        sys.exit(MACHINE_CANNOT)


_check()
