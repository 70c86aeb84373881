"""The five of a wire are five processes that prove themselves with five SPIFFE ids.

Asked of the kernel (who listens there, what runs as that process) and of a TLS
handshake of Python's own, never of us.
"""

import os
import socket
import ssl
import struct
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nsm.identity.authority import open_authority
from nsm.kernel.topology import enter_named
from tests.e2e.mesh.conftest import DOMAIN, Mesh, Started, identity

MODULES = {
    "nsc": "nsm.process.client",
    "nsmgr": "nsmgr",
    "registry": "registry",
    "forwarder": "forwarder",
    "responder": "endpoints.responder",
}


@pytest.fixture
def ours(mesh: Mesh, tmp_path: Path) -> dict[str, str]:
    """A certificate of alice's in files, for whoever is no program of the mesh."""
    home = open_authority(mesh.authority, DOMAIN)
    return identity(tmp_path, home, f"spiffe://{DOMAIN}/client/alice", home)


def context(ours: dict[str, str], protocol: int) -> ssl.SSLContext:
    """TLS as Python has it: the other end must prove itself to the domain's authority."""
    made = ssl.SSLContext(protocol)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(ours["bundle"])
    made.load_cert_chain(ours["cert"], ours["key"])
    made.set_alpn_protocols(["h2"])
    return made


def named(connection: ssl.SSLSocket) -> str:
    """The one URI of the certificate that the other end showed."""
    (uri,) = (value for kind, value in connection.getpeercert()["subjectAltName"] if kind == "URI")
    return uri


def who_listens(dial: Callable[[], socket.socket], ours: dict[str, str]) -> str:
    """The SPIFFE id behind a listener."""
    with context(ours, ssl.PROTOCOL_TLS_CLIENT).wrap_socket(dial()) as connection:
        return named(connection)


def unix(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(10)
    made.connect(path)
    return made


def owner(path: str) -> int:
    """The process that listens on a unix socket, as the kernel knows it."""
    with unix(path) as made:
        said = made.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", said)[0])


def own_socket(mesh: Mesh, pid: int) -> str:
    """The one socket of an endpoint, found by who listens there."""
    tmp = Path(mesh.paths.node("node-1", "tmp"))
    (path,) = (str(path) for path in tmp.glob("*/listen.on") if owner(str(path)) == pid)
    return path


def tcp(namespace: str, address: tuple[str, int]) -> socket.socket:
    """A connection that is made in another namespace, by a thread that goes there for it."""

    def dial() -> socket.socket:
        enter_named(namespace)
        return socket.create_connection(address, 10)

    with ThreadPoolExecutor(1) as there:
        return there.submit(dial).result()


def runs(pid: int) -> str:
    """The module that a process runs, by its command line."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return words[words.index("-m") + 1]


def is_asked_by(socket_path: Path, ours: dict[str, str], start: Callable[[], None]) -> str:
    """Listen, start somebody who asks there, and read who proves to be at the other end."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(20)
        listener.bind(str(socket_path))
        socket_path.chmod(0o777)
        listener.listen()
        start()
        raw, _ = listener.accept()
        with context(ours, ssl.PROTOCOL_TLS_SERVER).wrap_socket(raw, server_side=True) as one:
            return named(one)


def test_the_five_are_five_processes_with_five_spiffe_ids(mesh, ours, tmp_path):
    node = {name: mesh.paths.node("node-1", name) for name in ("nsm.io.sock", "forwarder.sock")}
    pids = {name: mesh.pid(f"node-1/{name}") for name in MODULES}
    endpoint = own_socket(mesh, pids["responder"])
    namespace = mesh.namespace("node-1")
    ids = {
        "nsmgr": who_listens(lambda: unix(node["nsm.io.sock"]), ours),
        "forwarder": who_listens(lambda: unix(node["forwarder.sock"]), ours),
        "responder": who_listens(lambda: unix(endpoint), ours),
        "registry": who_listens(lambda: tcp(namespace, ("198.18.0.1", 5002)), ours),
    }
    assert owner(node["nsm.io.sock"]) == pids["nsmgr"]
    assert owner(node["forwarder.sock"]) == pids["forwarder"]
    listening = ["ip", "netns", "exec", namespace, "ss", "-Hltnp", "sport", "=", ":5002"]
    said = subprocess.run(listening, capture_output=True, text=True, check=True).stdout
    assert f"pid={pids['registry']}," in said

    # Nobody listens at the client: so it is asked to come, under the same group as the lab's.
    process = mesh.process("node-1/nsc")
    door = tmp_path / "door.sock"
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to("/tmp/pytest-of-root"):
            folder.chmod(0o755)
    other: list[Started] = []

    def start() -> None:
        environment = {"NSM_NAME": "other", "NSM_CONNECT_TO": f"unix://{door}"}
        other.append(Started(mesh, process.module, "node-1/nsc", **environment))

    try:
        ids["nsc"] = is_asked_by(door, ours, start)
    finally:
        other[0].stopped()
    assert ids == {
        "nsc": f"spiffe://{DOMAIN}/client/nsc",
        "nsmgr": f"spiffe://{DOMAIN}/node/node-1/nsmgr",
        "registry": f"spiffe://{DOMAIN}/node/node-1/registry",
        "forwarder": f"spiffe://{DOMAIN}/node/node-1/forwarder",
        "responder": f"spiffe://{DOMAIN}/endpoint/responder",
    }
    assert {name: runs(pid) for name, pid in pids.items()} == MODULES
    assert len(set(pids.values())) == 5
    groups = {os.stat(f"/proc/{pid}").st_gid for pid in pids.values()}
    assert len(groups) == 5


def test_a_client_program_has_its_wire_beside_every_test(mesh):
    (address,) = (
        info["local"] for link in mesh.ip("nsc", "-4", "address", "show", "nsm-1")
        for info in link["addr_info"]
    )  # fmt: skip
    (route,) = mesh.ip("nsc", "-4", "route")
    assert route["dev"] == "nsm-1"
    assert route["dst"] != address
    assert mesh.pings("nsc", route["dst"])
