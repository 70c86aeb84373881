"""Every `nsmctl` that a page shows is one that can be typed."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from labs import lab as labfile
from nsmctl.command import app

ROOT = Path(__file__).parents[3]
PAGES = (*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md")
INDENTED = re.compile(r"^ {4}(?:sudo )?(nsmctl .+?)(?: +#.*)?$")
PROMPTED = re.compile(r"^\$ (?:sudo )?(nsmctl .+?)$")
INLINE = re.compile(r"`(?:sudo )?(nsmctl [^`]+)`")
SHORTENED = re.compile(r"[A-Z]{2,}|[|…]|\.\.\.")  # FILE, a|b: the form of a command, and no command


def shown() -> list[tuple[str, str, bool]]:
    """Pages, what stands there, and whether that is a whole line; else the verb may be all."""
    found = []
    for page in PAGES:
        for line in page.read_text().splitlines():
            if match := INDENTED.match(line) or PROMPTED.match(line):
                found.append((page.name, match[1], True))
            else:
                found += [(page.name, one, False) for one in INLINE.findall(line)]
    return [one for one in dict.fromkeys(found) if not SHORTENED.search(one[1])]


def typed(words: list[str], *, whole: bool) -> dict[str, Any]:
    """What the command is told by these words; raises click's UsageError. Nothing is run."""
    command: Any = typer.main.get_command(app)
    context = None
    while hasattr(command, "resolve_command") and words and not words[0].startswith("-"):
        context = command.context_class(command, info_name=command.name, parent=context)
        _, command, words = command.resolve_command(context, words)
        assert command
    if hasattr(command, "resolve_command"):  # a group of verbs, or an option of all
        assert not words or words[0] in [name for one in command.params for name in one.opts]
        return {}
    if not whole:
        return {}
    params: dict[str, Any] = command.make_context(command.name, words, parent=context).params
    return params


def test_pages_show_commands():
    assert len(shown()) > 50


@pytest.mark.parametrize(("page", "line", "whole"), shown())
def test_a_command_of_a_page_can_be_typed(page: str, line: str, whole: bool):
    words = shlex.split(line)[1:]
    told = typed(words, whole=whole)
    if words[0] == "lab" and "file" in told:
        labfile.read(labfile.find(told["file"]))
