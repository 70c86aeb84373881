"""WireGuard as the stock `wg` tells of it, be it the kernel's or a wireguard-go process's."""

import contextlib
import os
import subprocess
from dataclasses import dataclass
from typing import Any

from nsm.kernel import owner
from tests.e2e.wires.nodes import link
from tests.support.spaces import Space

SOCKETS = "/var/run/wireguard"


@dataclass(frozen=True)
class Sealed:
    """One end of a tunnel. process is 0 where it is the kernel's."""

    command: tuple[str, ...]
    name: str
    process: int
    private: str
    public: str
    port: int
    peer: str
    endpoint: str
    handshake: int
    keepalive: str

    @property
    def lasting(self) -> tuple[Any, ...]:
        """What must stay as long as the wire is the same."""
        return self.process, self.private, self.public, self.port, self.peer, self.endpoint

    def set(self, *words: str) -> None:
        """Change it as an operator would."""
        subprocess.run([*self.command, "wg", "set", self.name, *words], check=True)


def sealed(space: Space, device: str) -> Sealed:
    """The tunnel behind a device, which has exactly one far end."""
    found = link(space, device)
    command, name, process = ["ip", "netns", "exec", space.name], device, 0
    if found["linkinfo"]["info_kind"] == "tun":
        mark = owner.Mark.parse(found["ifalias"])
        assert mark, found
        command, name = [], owner.tunnel_name(mark.connection, mark.side)
        process = _of(name)
    shown = subprocess.run(
        [*command, "wg", "show", name, "dump"], capture_output=True, text=True, check=True
    )
    own, *peers = (line.split("\t") for line in shown.stdout.splitlines())
    assert len(peers) == 1, f"{len(peers)} far ends"
    ((peer, _, endpoint, allowed, handshake, _, _, keepalive),) = peers
    assert set(allowed.split(",")) == {"0.0.0.0/0", "::/0"}
    private, public, port, _ = own
    return Sealed(
        tuple(command), name, process, private, public, int(port),
        peer, endpoint, int(handshake), keepalive,
    )  # fmt: skip


def _of(name: str) -> int:
    """The wireguard-go process of a tunnel."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            if file.read().split(b"\0")[:3] == [b"wireguard-go", b"-f", name.encode()]:
                found.append(int(pid))
    (process,) = found
    return process


def kind(device: dict[str, Any]) -> str:
    """What a lab calls the device."""
    made: str = device["linkinfo"]["info_kind"]
    return "wireguard" if made == "tun" else made
