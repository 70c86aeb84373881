"""Who else on this machine manages links, and whether they would take ours for theirs.

They are asked by their own files, because there is nothing of ours yet that they could
have touched. Only devices in the node's own namespace are within their reach: tunnels
below workloads' devices (NSM_ISOLATION=hop), and wires of workloads of the node itself.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from nsm.kernel import owner
from nsmctl.machine import processes
from nsmctl.machine.asking import Answer, note, ok

FOLDERS: Final = ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib")  # who comes first, hides
NETWORK_MANAGER: Final = "etc/NetworkManager"
Section = Sequence[tuple[str, str]]
Sections = Mapping[str, Section]


@dataclass(frozen=True, slots=True)
class Ours:
    """A device as we make them, by what others choose devices by."""

    name: str
    kind: str
    type: str = "ether"


OURS: Final = (
    Ours("nsm-1", "veth"),
    Ours(owner.tunnel_name("example", "src"), "vxlan"),
    Ours(owner.lead_name("example", "src"), "veth"),
    Ours("nsm-1", "macvlan"),
    Ours("nsm-1", "wireguard", "wireguard"),
)
_CHANGES: Final = ("Name", "MACAddress", "MTUBytes")  # what a .link file does to any device
_WHERE: Final = ("Host", "Virtualization", "KernelCommandLine", "KernelVersion", "Architecture")


def udev() -> Answer:
    """Whether udev renames ours, or gives them other addresses.

    MACAddressPolicy= is no matter: it leaves a MAC alone that was given, and ours are.
    """
    if not processes.running("systemd-udevd"):
        return ok("does not run here")
    for ours in OURS:
        path, sections = _first(ours, "link", "OriginalName")
        changes = [key for key, _ in sections.get("Link", ()) if key in _CHANGES]
        if changes:
            return note(
                f"{path} sets {', '.join(changes)} of {ours.kind} {ours.name}",
                "let its [Match] leave out nsm*: OriginalName=!nsm*, then udevadm control -R",
            )
    return ok("leaves names and given MACs alone")


def networkd() -> Answer:
    """Whether systemd-networkd configures ours."""
    if not processes.running("systemd-networkd"):
        return ok("does not run here")
    for ours in OURS:
        path, sections = _first(ours, "network", "Name")
        if path and not _says_yes(sections, "Link", "Unmanaged"):
            return note(
                f"{path} takes {ours.kind} {ours.name}",
                "before it, a file with [Match] Name=nsm* [Link] Unmanaged=yes; networkctl reload",
            )
    return ok("leaves ours alone")


def network_manager() -> Answer:
    """Whether NetworkManager was told to leave ours alone; else it may manage them."""
    if not processes.running("NetworkManager"):
        return ok("does not run here")
    specs = _unmanaged()
    for ours in OURS:
        if not _matches(ours, specs):
            return note(
                f"may take {ours.kind} {ours.name} for its own",
                "[keyfile] unmanaged-devices+=interface-name:nsm* in /etc/NetworkManager/conf.d;"
                " nmcli general reload",
            )
    return ok("leaves ours alone")


# --- systemd's files -------------------------------------------------------------------------


def _first(ours: Ours, suffix: str, name_key: str) -> tuple[str, Sections]:
    """The file that decides about a device: the first that matches it, in the order of names."""
    found: dict[str, str] = {}
    for folder in reversed(FOLDERS):
        for name in _listed(f"{folder}/systemd/network"):
            if name.endswith(f".{suffix}"):
                found[name] = f"{folder}/systemd/network/{name}"
    for name, path in sorted(found.items()):
        sections = _read(path)
        for folder in reversed(FOLDERS):
            more = f"{folder}/systemd/network/{name}.d"
            for extra in sorted(_listed(more)):
                if extra.endswith(".conf"):
                    sections = _joined(sections, _read(f"{more}/{extra}"))
        if _is_matched(ours, sections.get("Match", ()), name_key):
            return path, sections
    return "", {}


def _is_matched(ours: Ours, match: Section, name_key: str) -> bool:
    asked = False
    for key in {key for key, _ in match}:
        words = [word for one, value in match if one == key for word in value.split()]
        if key in _WHERE or not words:
            continue
        asked = True
        value = {name_key: ours.name, "Kind": ours.kind, "Type": ours.type}.get(key)
        if value is None or not _chosen(value, words):
            return False  # by hardware, or by what only a driver has
    return asked


def _chosen(value: str, words: Sequence[str]) -> bool:
    if words[0].startswith("!"):
        return not any(fnmatchcase(value, word.removeprefix("!")) for word in words)
    return any(fnmatchcase(value, word) for word in words)


def _says_yes(sections: Sections, section: str, key: str) -> bool:
    values = [value for one, value in sections.get(section, ()) if one == key]
    return bool(values) and values[-1].lower() in ("yes", "true", "on", "1")


# --- NetworkManager's ------------------------------------------------------------------------


def _unmanaged() -> list[str]:
    """What `unmanaged-devices` says: of the last file that says it, and of those that add to it."""
    paths = [
        *_confs("/usr/lib/NetworkManager/conf.d"),
        *_confs("/run/NetworkManager/conf.d"),
        f"/{NETWORK_MANAGER}/NetworkManager.conf",
        *_confs(f"/{NETWORK_MANAGER}/conf.d"),
    ]
    specs: list[str] = []
    for path in paths:
        for key, value in _read(path).get("keyfile", ()):
            more = [word.strip() for word in value.replace(",", ";").split(";") if word.strip()]
            if key == "unmanaged-devices":
                specs = more
            elif key == "unmanaged-devices+":
                specs += more
    return specs


def _confs(folder: str) -> list[str]:
    return [f"{folder}/{name}" for name in sorted(_listed(folder)) if name.endswith(".conf")]


def _matches(ours: Ours, specs: Sequence[str]) -> bool:
    def fits(spec: str) -> bool:
        what, _, value = spec.partition(":")
        if what == "interface-name":
            return ours.name == value[1:] if value[:1] == "=" else fnmatchcase(ours.name, value)
        return spec == "*" or (what == "type" and value == ours.kind)

    excepted = [spec.removeprefix("except:") for spec in specs if spec.startswith("except:")]
    return any(map(fits, specs)) and not any(map(fits, excepted))


# --- both ------------------------------------------------------------------------------------


def _read(path: str) -> Sections:
    """An INI file, in which a key may stand several times; nothing if it cannot be read."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for section, key, value in _lines(path):
        sections.setdefault(section, []).append((key, value))
    return sections


def _lines(path: str) -> Iterator[tuple[str, str, str]]:
    section = ""
    try:
        with open(path, errors="replace") as file:
            text = file.read(1 << 20)
    except OSError:
        return
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
        elif line and line[0] not in "#;" and "=" in line:
            key, _, value = line.partition("=")
            yield section, key.strip(), value.strip()


def _joined(one: Sections, other: Sections) -> Sections:
    return {name: [*one.get(name, ()), *other.get(name, ())] for name in {*one, *other}}


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
