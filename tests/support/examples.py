"""docs/parity.py as a module: upstream's examples, and the runs of their labs."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def _module() -> ModuleType:
    path = Path(__file__).parents[2] / "docs" / "parity.py"
    spec = importlib.util.spec_from_file_location("docs_parity", path)
    assert spec
    assert spec.loader
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # where dataclasses look
    spec.loader.exec_module(found)
    return found


parity = _module()
LISTED = [one for part in parity.index().values() for one in part]
SHOWN = [one for one in LISTED if not one.missing]
