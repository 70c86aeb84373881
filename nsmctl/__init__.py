"""The command people use: one function for each verb, tables for them, JSON for scripts."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - pip knows, but a source tree is run by any
    sys.stderr.write(
        f"nsmctl needs Python 3.11 or newer, and this is {sys.version.split()[0]}:"
        f" {sys.executable}\n  make setup PYTHON=/path/to/python\n"
    )
    raise SystemExit(3)
