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
    Ours("nsm-1", "tun", "none"),  # wireguard-go's
)
# what a .link file does to any device; the alias is our mark, by which a forwarder finds its own
_CHANGES: Final = ("Name", "Alias", "MACAddress", "MTUBytes")
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
    files = [_read(path) for path in _manager_files()]
    specs = _unmanaged(files)
    for ours in OURS:
        if not _matches(ours, specs) and _is_managed(ours, files):
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
        # a device without hardware has its kind for a driver
        value = {
            name_key: ours.name, "Kind": ours.kind, "Type": ours.type, "Driver": ours.kind
        }.get(key)  # fmt: skip
        if value is None or not _chosen(value, words):
            return False  # by hardware
    return asked


def _chosen(value: str, words: Sequence[str]) -> bool:
    if words[0].startswith("!"):
        return not any(fnmatchcase(value, word.removeprefix("!")) for word in words)
    return any(fnmatchcase(value, word) for word in words)


def _says_yes(sections: Sections, section: str, key: str) -> bool:
    values = [value for one, value in sections.get(section, ()) if one == key]
    return bool(values) and values[-1].lower() in ("yes", "true", "on", "1")


# --- NetworkManager's ------------------------------------------------------------------------


def _manager_files() -> list[str]:
    """Its files, those that hold last; one of the same name in a later folder hides an earlier."""
    etc = f"/{NETWORK_MANAGER}/conf.d"
    paths: list[str] = []
    hidden: set[str] = set()
    for folder in (etc, "/run/NetworkManager/conf.d", "/usr/lib/NetworkManager/conf.d"):
        names = {name for name in _listed(folder) if name.endswith(".conf")}
        here = [f"{folder}/{name}" for name in sorted(names - hidden)]
        paths = [*here, *paths]
        if folder == etc:  # before those, and after all others
            paths.insert(0, f"/{NETWORK_MANAGER}/NetworkManager.conf")
        hidden |= names
    return paths


def _unmanaged(files: Sequence[Sections]) -> list[str]:
    """What `unmanaged-devices` says: of the last file that says it, and of those that change it."""
    specs: list[str] = []
    for sections in files:
        for key, value in sections.get("keyfile", ()):
            words = _words(value)
            if key == "unmanaged-devices":
                specs = words
            elif key == "unmanaged-devices+":
                specs += words
            elif key == "unmanaged-devices-":
                specs = [word for word in specs if word not in words]
    return specs


def _is_managed(ours: Ours, files: Sequence[Sections]) -> bool:
    """Whether no [device] section says otherwise: the last file's first one that matches."""
    for sections in reversed(files):
        for name, section in sections.items():
            said = dict(section)
            if not name.startswith("device") or "managed" not in said:
                continue
            if "match-device" not in said or _matches(ours, _words(said["match-device"])):
                return said["managed"].lower() not in ("0", "no", "false", "off")
    return True


def _words(value: str) -> list[str]:
    return [word.strip() for word in value.replace(",", ";").split(";") if word.strip()]


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
