"""Whose files our modules' names stand for.

Names like `registry` and `forwarder` are common. A folder of that name on PYTHONPATH, or
in the working directory, is found before ours; a package of that name that is installed
beside us writes over our files, because pip lets it. Both would be run in our place.
"""

import base64
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from importlib import metadata
from typing import Final

from nsm.errors import PreconditionError

OURS: Final = ("nsm", "nsmgr", "forwarder", "registry", "endpoints", "labs", "nsmctl")
DISTRIBUTION: Final = "vwire"
BEGINS: Final = {f"{name}/{file}.py" for name in OURS for file in ("__init__", "__main__")}
AGAIN: Final = (
    "install vwire again, the wheel of `make wheel`:"
    " pip install --force-reinstall --no-deps vwire-*.whl"
)


def refuse_foreign() -> None:
    """Raises PreconditionError with the path of what is not ours, and with what to do."""
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    for name in OURS:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # or a folder of that name is all there is
            raise PreconditionError(
                f"vwire in {home} lacks its module {name!r}",
                hint=f"another package of that name was uninstalled; {AGAIN}",
            )
        if os.path.dirname(os.path.dirname(os.path.realpath(spec.origin))) != home:
            raise PreconditionError(
                f"the module {name!r} comes from {spec.origin}, not from vwire in {home}",
                hint="start with python -P -m, and take what shadows it off PYTHONPATH",
            )
    for file in _changed(home):
        if not os.path.exists(os.path.join(home, file)):
            raise PreconditionError(
                f"vwire in {home} lacks its file {file}",
                hint=f"another package that had one of that name was uninstalled; {AGAIN}",
            )
        others = " and ".join(_owners(file))
        if others or file in BEGINS:  # of the rest, what no package claims was changed by hand
            raise PreconditionError(
                f"{home}/{file} is not vwire's: {others or 'another package'} was installed over"
                " it",
                hint="give vwire an environment of its own, as pipx does; or uninstall the other,"
                f" then {AGAIN}",
            )


def _changed(home: str) -> Iterator[str]:
    """Files that are not those that were installed: by what they hold where a module of ours
    begins, by their size elsewhere, which takes a millisecond for all of them."""
    try:
        own = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return  # a source tree
    if os.path.realpath(str(own.locate_file(""))) != home:
        return  # a source tree, and an installed one beside it
    for file in own.files or ():
        if file.hash is None or file.parts[0] not in OURS:
            continue
        try:
            same = os.stat(os.path.join(home, file)).st_size == file.size
            if same and str(file) in BEGINS:
                with open(os.path.join(home, file), "rb") as there:
                    digest = hashlib.new(file.hash.mode, there.read()).digest()
                same = base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value
        except FileNotFoundError:
            same = False
        if not same:
            yield str(file)


def _owners(file: str) -> Iterator[str]:
    """The other installed packages that say that file is theirs."""
    for other in metadata.distributions():
        if other.name != DISTRIBUTION and any(str(one) == file for one in other.files or ()):
            yield f"{other.name} {other.version}"
