"""Imports structlog without rich, which is there for `nsmctl` and would colour tracebacks.

Ours are plain, and rich takes 5 MB in each process of a node. To be imported before all that
logs; a process that has either of them already keeps what it has.
"""

import sys

if not {"structlog", "rich"} & sys.modules.keys():
    sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog  # noqa: F401
    finally:
        del sys.modules["rich"]
