"""What `make check` asks of the documentation: that what it points at is there.

- relative links in *.md lead to files;
- code that cites `wire.md` §n cites a section docs/wire.md has;
- pages that code or pages name exist;
- decisions are numbered without gaps and say context, decision, consequences;
- CONTRIBUTING.md and docs/architecture.md stay one page, CHANGELOG.md has an Unreleased part;
- docs/processes.md has the settings the programs have, and docs/modules.md the modules there are:
  `docs/check.py --write` puts them there;
- docs/parity.md is of a run of the labs that labs/parity/index.yaml lists: `make parity` writes it.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path

import parity

from nsm.process.config import Common, rows

ROOT = Path(__file__).parent.parent
PAGE = 80  # lines
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
CITATION = re.compile(r"wire\.md`?((?:,? ?(?:and )?§\d+(?:\.\d+)*)+)")
SECTION = re.compile(r"^#{2,3} (\d+(?:\.\d+)*)", re.MULTILINE)
PROCESSES = ROOT / "docs" / "processes.md"
MODULES = ROOT / "docs" / "modules.md"
GENERATED = "<!-- from here on by docs/check.py --write, from each program's Config -->\n"
CONFIGS = {  # by the module that `python -P -m` starts
    "nsmgr": "nsmgr.config",
    "nsmgr.proxy": "nsmgr.proxy.config",
    "forwarder": "forwarder.config",
    "registry": "registry.config",
    "registry.proxy": "registry.proxy.config",
    "endpoints.responder": "endpoints.responder.config",
    "endpoints.vl3": "endpoints.vl3.config",
    "endpoints.supplier": "endpoints.supplier.config",
    "endpoints.ipam": "endpoints.ipam.config",
    "nsm.process.client": "nsm.process.client",
    "nsm.process.issuer": "nsm.process.issuer",
}
ROOMS = ("nsmctl", "labs", "nsmgr", "forwarder", "registry", "endpoints", "nsm")
NAMED = re.compile(r"[\w./-]*\b[\w-]+\.md\b")


def files(*patterns: str) -> list[Path]:
    """What git knows, and new files it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).exists()]


def dead_links() -> Iterator[str]:
    for page in files("*.md"):
        for target in LINK.findall(page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                yield f"{page.relative_to(ROOT)}: link to {target}, which is not there"


def wrong_citations() -> Iterator[str]:
    sections = set(SECTION.findall((ROOT / "docs" / "wire.md").read_text()))
    for path in files("*.py", "*.proto", "docs/decisions/*.md", "README.md"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for cited in CITATION.findall(line):
                for section in re.findall(r"\d+(?:\.\d+)*", cited):
                    if section not in sections:
                        yield f"{path.relative_to(ROOT)}:{number}: wire.md has no §{section}"


def unknown_pages() -> Iterator[str]:
    known = {path.name for path in files("*.md")}
    for path in files("*.py", "*.md", "*.proto", "*.toml", "Makefile"):
        if path.name in {"wire.md", "check.py"}:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for named in NAMED.findall(line):
                if Path(named).name not in known:
                    yield f"{path.relative_to(ROOT)}:{number}: {named} is not a page here"


def odd_decisions() -> Iterator[str]:
    pages = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    for number, page in enumerate(pages, 1):
        text = page.read_text()
        if not page.name.startswith(f"{number:04}-") or not text.startswith(f"# {number}. "):
            yield f"{page.relative_to(ROOT)}: expected number {number}, in the name and the title"
        for part in ("**Context.**", "**Decision.**", "**Consequences.**"):
            if part not in text:
                yield f"{page.relative_to(ROOT)}: has no {part}"


def long_pages() -> Iterator[str]:
    pages = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"]
    for page in [*pages, *(ROOT / "docs" / "decisions").glob("[0-9]*.md")]:
        if (lines := len(page.read_text().splitlines())) > PAGE:
            yield f"{page.relative_to(ROOT)}: {lines} lines, more than a page of {PAGE}"
    if "\n## Unreleased\n" not in (ROOT / "CHANGELOG.md").read_text():
        yield "CHANGELOG.md: has no part Unreleased"


def settings() -> str:
    """The tables of docs/processes.md."""
    common = list(rows(Common))
    parts = [
        GENERATED,
        _table("Every program", "", [row for row in common if row[0] != "NSM_NAME"]),
    ]
    for module, where in CONFIGS.items():
        kind = import_module(where).Config
        own = [row for row in rows(kind) if row not in common]
        parts.append(_table(f"`python -P -m {module}`", (kind.__doc__ or "").strip(), own))
    return "\n".join(parts)


def _table(title: str, about: str, found: list[tuple[str, str, str]]) -> str:
    lines = [
        f"| `{variable}` | {f'`{default}`' if default else ''} | {_cell(meaning)} |"
        for variable, default, meaning in found
    ]
    head = ["| variable | default | meaning |", "|---|---|---|"]
    return "\n".join([f"## {title}\n", *([about, ""] if about else []), *head, *lines, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def untrue_settings() -> Iterator[str]:
    if PROCESSES.read_text().partition(GENERATED)[2] != settings().partition(GENERATED)[2]:
        yield "docs/processes.md: not what the programs have: python docs/check.py --write"


def modules() -> str:
    """docs/modules.md: what each module says of itself first."""
    found: dict[str, list[str]] = {}
    for path in files(*(f"{room}/*.py" for room in ROOMS)):
        about = ast.get_docstring(ast.parse(path.read_text())) or ""
        if about and path.parent.name != "proto":
            room = path.parent.relative_to(ROOT).as_posix()
            first = about.partition("\n\n")[0]
            found.setdefault(room, []).append(f"| `{path.stem}` | {_cell(first)} |")
    head = ["# Modules, by room\n", "Written by `docs/check.py --write`, from the modules.\n"]
    rooms = sorted(found, key=lambda one: (ROOMS.index(one.partition("/")[0]), one))
    tables = ([f"## `{one}/`\n", "| module | |", "|---|---|", *found[one], ""] for one in rooms)
    return "\n".join([*head, *chain(*tables)])


def untrue_modules() -> Iterator[str]:
    if not MODULES.exists() or MODULES.read_text() != modules():
        yield "docs/modules.md: not what the modules say: python docs/check.py --write"


def main() -> int:
    """Print what is wrong, a line each; exit 1 if anything is."""
    if sys.argv[1:] == ["--write"]:
        MODULES.write_text(modules())
        PROCESSES.write_text(PROCESSES.read_text().partition(GENERATED)[0] + settings())
    checks = (
        dead_links,
        wrong_citations,
        unknown_pages,
        odd_decisions,
        long_pages,
        untrue_settings,
        untrue_modules,
        parity.untrue,
    )
    wrong = [line for check in checks for line in check()]
    sys.stderr.write("".join(f"{line}\n" for line in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
