"""Whose files our modules' names stand for.

Names like `registry` and `forwarder` are common. A folder of that name on PYTHONPATH, or
in the working directory, is found before ours; a package of that name that is installed
beside us writes over our files, because pip lets it. Both would be run in our place.
"""

import base64
import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from importlib import metadata
from typing import Final

from nsm.errors import PreconditionError

OURS: Final = ("nsm", "nsmgr", "forwarder", "registry", "endpoints", "labs", "nsmctl")
DISTRIBUTION: Final = "vwire"


def refuse_foreign() -> None:
    """Raises PreconditionError with the path of what is not ours, and with what to do."""
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    for name in OURS:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # or a folder of that name is all there is
            raise PreconditionError(
                f"vwire in {home} lacks its module {name!r}",
                hint="another package of that name was uninstalled; install vwire again:"
                " pip install --force-reinstall --no-deps vwire",
            )
        if os.path.dirname(os.path.dirname(os.path.realpath(spec.origin))) != home:
            raise PreconditionError(
                f"the module {name!r} comes from {spec.origin}, not from vwire in {home}",
                hint="start with python -P -m, and take what shadows it off PYTHONPATH",
            )
    for file in _written_over(home):
        others = " and ".join(_owners(file)) or "another package"
        raise PreconditionError(
            f"{home}/{file} is not vwire's: {others} was installed over it",
            hint="give vwire an environment of its own, as pipx does; or uninstall the other,"
            " then pip install --force-reinstall --no-deps vwire",
        )


def _written_over(home: str) -> Iterator[str]:
    """Files by which our modules begin, and that are not those that were installed."""
    try:
        own = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return  # a source tree
    if os.path.realpath(str(own.locate_file(""))) != home:
        return  # a source tree, and an installed one beside it
    begins = {f"{name}/{file}.py" for name in OURS for file in ("__init__", "__main__")}
    for file in own.files or ():
        if str(file) in begins and file.hash is not None:
            with contextlib.suppress(FileNotFoundError):  # a module that is missing has its say
                with open(os.path.join(home, file), "rb") as there:
                    digest = hashlib.new(file.hash.mode, there.read()).digest()
                if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
                    yield str(file)


def _owners(file: str) -> Iterator[str]:
    """The other installed packages that say that file is theirs."""
    for other in metadata.distributions():
        if other.name != DISTRIBUTION and any(str(one) == file for one in other.files or ()):
            yield f"{other.name} {other.version}"
