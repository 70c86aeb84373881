"""Machines with vwire's units on them, installed as docs/systemd.md says."""

import contextlib
import re
import subprocess
from collections.abc import Iterator
from typing import Any

from tests.e2e.systemd.machine import ROOT, Machine, machine, wait
from tests.e2e.wires.nodes import identity

CLIENT = "nsm.process.client"
PAGE = (ROOT / "docs" / "systemd.md").read_text()
UNITS = ("vwire-issuer", "vwire-registry", "vwire-nsmgr", "vwire-forwarder")
WORKLOADS = ("app", "near", "sealed", "root", "extra", "more", "safe", "pong", "far", "vault")
STATE = "/var/lib/vwire/issuer"
ELSEWHERE = [
    "umask 022",
    "python3 -m venv /opt/vwire",
    "/opt/vwire/bin/pip install dist/vwire-*.whl",
]
UPGRADE = [
    "/opt/vwire/bin/pip install --force-reinstall --no-deps dist/vwire-*.whl",
    "/opt/vwire/bin/pip install dist/vwire-*.whl",
]
START = "systemctl enable --now vwire-issuer vwire-registry vwire-nsmgr vwire-forwarder"


def unit_file(name: str) -> dict[str, str]:
    """What a unit's file sets, the last word of each that is said again without being emptied."""
    text = (ROOT / "deploy" / "systemd" / f"{name}.service").read_text()
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))


def commands(section: str) -> list[str]:
    """The commands of one part of the page, in its order."""
    (part,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    blocks = "".join(re.findall(r"^```console\n(.*?)^```", part, re.MULTILINE | re.DOTALL))
    return [line.removeprefix("$ ") for line in blocks.splitlines() if line.startswith("$ ")]


def files(section: str) -> dict[str, str]:
    """The files one part of the page shows, by the path in their first line."""
    (part,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^```(?:ini|sh)\n# (/\S+)\n(.*?)^```", part, re.MULTILINE | re.DOTALL)
    return dict(blocks)


def write(one: Machine, path: str, text: str) -> None:
    one.sh(f"mkdir -p {path.rpartition('/')[0]}; cat >{path} <<'END'\n{text}END")


def install(one: Machine) -> None:
    """Type what the page says, from where /opt/vwire stands to where the units are started."""
    lines = commands("Install")
    assert lines[: len(ELSEWHERE)] == ELSEWHERE
    one.sh("\n".join(lines[len(ELSEWHERE) : lines.index(START)]))
    known = "".join(
        f"- id: spiffe://example.org/{name}\n  cgroup: /system.slice/{name}.service\n"
        for name in WORKLOADS
    )
    one.sh(f"cat >>/etc/vwire/entries.yaml <<'END'\n{known}END")


def share_authority(of: Machine, to: Machine) -> None:
    """Both issuers speak for the same trust domain."""
    pem = of.run("cat", f"{STATE}/authority.pem")
    (command,) = commands("Several machines")
    to.sh(f"cd /run; cat >authority.pem <<'END'\n{pem}END\n{command}; rm authority.pem")


CHALK = 4711  # a length of a queue: whoever makes a device anew does not know of it


class Standing:
    """Wires as they stand now, from end to end: none of their devices may be made anew."""

    def __init__(self, east: Machine, west: Machine, *clients: str) -> None:
        self._machines = east, west
        self._clients = clients
        endings = ((east, "pong"), (west, "far"), (west, "vault"))
        self._places = (*((east, unit) for unit in clients), *endings)
        for one, unit in self._places:
            for device in one.links(unit):
                chalk = ("ip", "link", "set", device["ifname"], "txqueuelen", str(CHALK))
                one.within(unit, *chalk)
        self._stood = self._look()

    def refreshed(self, by: str) -> None:
        """Wait until a program on the first machine has granted all of them in its present life."""
        first, _ = self._machines
        wait(lambda: len(first.granted(by)) >= len(self._clients), f"refreshes by {by}")

    def changed(self) -> set[tuple[Any, ...]]:
        """What was there and is not any more; empty if all is as it stood."""
        return self._stood - self._look()

    def _look(self) -> set[tuple[Any, ...]]:
        devices = {
            (unit, *identity(device), device["txqlen"])
            for one, unit in self._places
            for device in one.links(unit)
        }
        search = "grep -lz ^wireguard-go /proc/[0-9]*/cmdline || true"
        engines = {(one.name, path) for one in self._machines for path in one.sh(search).split()}
        return devices | engines


@contextlib.contextmanager
def setting(one: Machine, program: str, line: str) -> Iterator[None]:
    """Another line in the file of a program's settings, for the block. It is not restarted."""
    path = f"/etc/vwire/{program}.env"
    one.sh(f"cp {path} /run/{program}.env; echo {line} >>{path}")
    try:
        yield
    finally:
        one.sh(f"mv /run/{program}.env {path}")


@contextlib.contextmanager
def pair() -> Iterator[tuple[Machine, Machine]]:
    """East with everything, west with all but the registry, a cable between them."""
    with machine("east") as east, machine("west") as west:
        ends = zip((east, west), ("198.18.0.1", "198.18.0.2"), strict=True)
        subprocess.run(
            ["ip", "link", "add", "wan0", "netns", str(east.pid), "type", "veth",
             "peer", "name", "wan0", "netns", str(west.pid)],
            check=True,
        )  # fmt: skip
        for one, address in ends:
            one.sh(f"ip link set lo up; ip addr add {address}/24 dev wan0; ip link set wan0 up")
            install(one)
            for path, text in files("Several machines").items():
                write(one, path, text)
            # the same on every kernel, and the one that has processes of its own
            one.sh("echo NSM_WIREGUARD=userspace >/etc/vwire/forwarder.env")
        east.sh(START)
        share_authority(east, west)
        west.sh(START.replace("vwire-registry", ""))
        yield east, west
