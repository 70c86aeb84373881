"""docs/systemd.md, every command and file of it, as a person types them; and `nsmctl systemd`."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.install.conftest import NOT_SOURCE, build, copy_needed
from tests.e2e.systemd.machine import Machine, machine, wait
from tests.e2e.systemd.mesh import (
    ELSEWHERE,
    PAGE,
    ROOT,
    START,
    UNITS,
    UPGRADE,
    commands,
    files,
    install,
    write,
)

# An SVID as files, as something else may keep them; then the example, as nobody with rights.
STOCK = """
import asyncio, os, sys
from pathlib import Path
from cryptography.hazmat.primitives.serialization import Encoding
from nsm.identity.workload import workload_source

async def main():
    async with workload_source(os.environ["SPIFFE_ENDPOINT_SOCKET"], patience=10) as source:
        identity = source.identity
    bundle = b"".join(c.public_bytes(Encoding.PEM) for c in identity.bundles["example.org"])
    for name, pem in (("cert", identity.svid.chain_pem()), ("key", identity.svid.key_pem()),
                      ("bundle", bundle)):
        Path(f"{name}.pem").write_bytes(pem)

asyncio.run(main())
os.execv(sys.executable, [
    sys.executable, "-P", "/opt/source/examples/stock_grpcio_client.py", "echo", "nsm-1",
    "unix:///var/lib/networkservicemesh/nsm.io.sock", "spiffe://example.org/nsmgr", "nsmgr",
    "cert.pem", "key.pem", "bundle.pem"])
"""


@pytest.fixture(scope="module")
def one() -> Iterator[Machine]:
    with machine("page") as made:
        yield made


def test_the_page_from_install_to_uninstall(one):
    lines = commands("Install")
    first = len(ELSEWHERE)
    assert lines[:first] == ELSEWHERE
    said = {line: one.sh(line) for line in lines[first:]}
    wrote = said[lines[first]]
    assert [line.split()[0] for line in wrote.splitlines()] == ["wrote"] * 7 + ["look"]
    assert f"then: {START}\n" in wrote
    assert said[lines[-1]].startswith("no wires (")  # which the manager said, at that address
    assert START in said
    assert "Active: active (running)" in said["systemctl status vwire-forwarder"]
    assert 'Status: "forwarder forwarder-page' in said["systemctl status vwire-forwarder"]
    assert "forwarder-page" in said["journalctl --unit vwire-forwarder"]
    assert one.active(*UNITS)

    for path, text in files("A service with a wire").items():
        write(one, path, text)
    *lines, last = commands("A service with a wire")
    for line in lines:
        one.sh(line)
    assert "1 packets transmitted, 1 received" in one.sh(last)

    lines = commands("Restart and upgrade")
    assert lines[: len(UPGRADE)] == UPGRADE
    lines = lines[len(UPGRADE) :]
    settings = one.run("cat", "/etc/vwire/entries.yaml")
    again, restart = (one.sh(line) for line in lines)
    assert "kept /etc/vwire/entries.yaml\nkept /etc/vwire/issuer.env\n" in again
    assert one.run("cat", "/etc/vwire/entries.yaml") == settings
    assert restart == ""
    assert one.active(*UNITS)
    one.run("systemctl", "start", "app")  # over the wire of before

    one.stop("wire", "pong")
    one.sh("rm /etc/systemd/system/{pong,wire,app}.service; systemctl daemon-reload")
    uninstall, remove = commands("Uninstall")
    assert remove == "rm -r /opt/vwire"
    one.sh(uninstall)
    left = one.sh(
        "find /etc /run /var -name '*vwire*' -o -name networkservicemesh; systemctl --all;"
        " ls -d /run/wireguard 2>/dev/null || true"
    )
    assert "vwire" not in left
    assert "wireguard" not in left
    assert "vwire" not in one.run("cat", "/etc/passwd", "/etc/group", "/etc/shadow")


def test_every_command_of_the_page_is_known_to_a_test():
    """What is not typed above is typed where machines are made for other tests."""
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    here = ("Install", "A service with a wire", "Several machines", "Restart and upgrade")
    known = [line for section in (*here, "Uninstall") for line in commands(section)]
    assert "".join(blocks).splitlines() == [f"$ {line}" for line in known]
    titles = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    shown = [path for title in titles for path in files(title)]
    assert len(shown) == len(set(shown)) == PAGE.count("```ini\n") + PAGE.count("```sh\n")


def test_the_page_shows_other_managers_of_links_what_is_shipped_for_them():
    shown = files("Other managers of links")
    for path, text in shown.items():
        folder, name = path.split("/")[2 if "NetworkManager" in path else 3], path.split("/")[-1]
        shipped = {"network": "networkd"}.get(folder, folder)
        file = (ROOT / "deploy" / shipped / name).read_text()
        assert text == "".join(line for line in file.splitlines(True) if not line.startswith("#"))
    assert len(shown) == 2


@pytest.fixture
def installed(one: Machine) -> Iterator[Machine]:
    install(one)
    one.sh(START)
    yield one
    one.sh("nsmctl systemd uninstall --purge")


def test_stock_clients_of_other_users_need_the_drop_in_of_the_page(installed):
    (path,) = (one for one in files("What each may do") if "nsmgr" in one)
    installed.start(
        "pong",
        "endpoints.responder",
        NSM_SERVICE_NAMES="echo",
        NSM_CIDR_PREFIX="172.16.1.0/24",
    )
    write(installed, "/opt/stock.py", STOCK)
    try:
        run = (
            "systemd-run --quiet --unit=extra --property=DynamicUser=yes"
            " --property=PrivateNetwork=yes --property=RuntimeDirectory=extra"
            " --property=WorkingDirectory=/run/extra"
            " --setenv=SPIFFE_ENDPOINT_SOCKET=unix:///run/vwire/issuer/agent.sock"
            " /opt/vwire/bin/python -P /opt/stock.py"
        )
        installed.sh(run)
        hint = "If another user runs it, the manager needs CAP_SYS_PTRACE"
        wait(lambda: hint in installed.journal("extra"), "the refusal", bar=3)
        wait(lambda: installed.show("extra", "ActiveState") == "failed", "the end of it")
        write(installed, path, files("What each may do")[path])
        installed.sh("systemctl daemon-reload; systemctl restart vwire-nsmgr")
        installed.sh(f"systemctl reset-failed extra; {run}")
        wait(lambda: "nsm-1 172.16.1.1/32\n" in installed.journal("extra"), "a wire", bar=3)
        assert installed.pings("extra")
    finally:
        installed.sh("systemctl stop extra pong; systemctl reset-failed")


@pytest.mark.long
def test_entries_that_say_netns_need_the_drop_in_of_the_page(installed):
    (path,) = (one for one in files("What each may do") if "issuer" in one)
    place = "- {id: spiffe://example.org/inside, netns: /run/netns/named}\n"
    installed.sh(f"ip netns add named; printf -- '{place}' >>/etc/vwire/entries.yaml")
    asks = (
        "import asyncio, os, sys\n"
        "from nsm.identity.workload import workload_source\n"
        "async def main():\n"
        "    at = 'unix:///run/vwire/issuer/agent.sock'\n"
        "    async with workload_source(at, patience=5) as source:\n"
        "        print(source.identity.svid.id)\n"
        "asyncio.run(main())\n"
    )
    write(installed, "/opt/asks.py", asks)
    ask = "ip netns exec named setpriv --reuid=4711 --regid=4711 --clear-groups"
    ask += " /opt/vwire/bin/python -P /opt/asks.py"
    try:
        assert "network namespace one that cannot be read" in installed.sh(ask, wrong=True)
        write(installed, path, files("What each may do")[path])
        installed.sh("systemctl daemon-reload; systemctl restart vwire-issuer")
        assert installed.sh(ask) == "spiffe://example.org/inside\n"
    finally:
        installed.run("ip", "netns", "del", "named")


@pytest.mark.long
def test_the_wheel_alone_brings_all_that_is_installed(one, tmp_path):
    source = shutil.copytree(ROOT, tmp_path / "vwire", ignore=NOT_SOURCE)
    made = build(source, "make", "-o", "setup", "wheel", f"BIN={Path(sys.executable).parent}")
    inside = Path(f"/proc/{one.pid}/root/opt")
    (inside / "dist").mkdir()
    shutil.copy(made, inside / "dist")
    copy_needed(made, inside / "needed")  # where pip finds it installed: there is no index here
    umask, venv, *pip = (*ELSEWHERE, *UPGRADE)
    site = "$(echo /opt/vwire/lib/python3*/site-packages)"
    python = "PATH=/opt/python/bin:$PATH PIP_NO_INDEX=1; export PATH PIP_NO_INDEX"
    lines = (python, umask, "cd /opt", venv, f"echo /opt/needed >{site}/needed.pth", *pip)
    one.sh("mv /opt/vwire /opt/before")
    try:
        one.sh("\n".join(lines))
        install(one)
        one.sh(START)
        assert one.active(*UNITS)
        where = "import forwarder, nsm; print(forwarder.__file__, nsm.__file__)"
        told = one.run("/opt/vwire/bin/python", "-P", "-c", where).split()
        assert all(path.startswith(one.sh(f"echo {site}").strip()) for path in told)
    finally:
        one.sh("nsmctl systemd uninstall --purge; rm -r /opt/vwire /opt/dist /opt/needed")
        one.sh("mv /opt/before /opt/vwire")


# --- nsmctl systemd --------------------------------------------------------------------------


def test_the_verb_tells_scripts_what_it_wrote_kept_and_removed(one):
    first = json.loads(one.sh("nsmctl systemd install --json"))
    assert first["python"] == "/opt/vwire/bin/python"
    assert first["kept"] == []
    assert len(first["wrote"]) == 7
    second = json.loads(one.sh("nsmctl systemd install --json"))
    assert second["kept"] == ["/etc/vwire/entries.yaml", "/etc/vwire/issuer.env"]
    units = json.loads(one.sh("nsmctl systemd uninstall --json"))["removed"]
    assert sorted([*units, *second["kept"]]) == sorted(first["wrote"])
    assert one.run("ls", "/etc/vwire") == "entries.yaml\nissuer.env\n"
    rest = json.loads(one.sh("nsmctl systemd uninstall --purge --json"))["removed"]
    assert rest == ["/etc/vwire", *(f"user {unit}" for unit in UNITS)]


def test_units_name_the_python_that_installs_them(one):
    one.sh('"$(readlink -f /opt/vwire/bin/python)" -m venv --without-pip /opt/other')
    one.sh("cp /opt/vwire/lib/python3*/site-packages/vwire.pth /opt/other/lib/python3*/site-*/")
    try:
        one.sh("/opt/other/bin/python -P -m nsmctl systemd install")
        unit = one.run("cat", "/etc/systemd/system/vwire-nsmgr.service")
        assert "ExecStart=/opt/other/bin/python -P -m nsmgr\n" in unit
    finally:
        one.sh("nsmctl systemd uninstall --purge; rm -r /opt/other")


def test_a_python_that_the_units_users_cannot_reach_is_refused_with_what_to_do(one):
    one.sh("mkdir -m 700 /opt/own; cp -a /opt/vwire /opt/own/vwire")
    try:
        said = one.sh("/opt/own/vwire/bin/python -P -m nsmctl systemd install", wrong=True)
        assert "users cannot reach /opt/own/vwire/bin/python: /opt/own is closed to them" in said
        assert " && ".join(ELSEWHERE) in said
        assert one.run("ls", "/etc/systemd/system").split() == []
    finally:
        one.sh("rm -r /opt/own")


ADMINS = """
import os, socket
os.mkdir("/run/wireguard", 0o755)
socket.socket(socket.AF_UNIX).bind("/run/wireguard/wg0.sock")
os.chmod("/run/wireguard/wg0.sock", 0o700)
"""


def test_neither_a_careful_umask_nor_an_administrators_own_wireguard_go_is_in_the_way(one):
    listed = "find /run/wireguard -printf '%p %u %m\\n'"
    write(one, "/opt/admins.py", ADMINS)
    one.sh("umask 022; /opt/vwire/bin/python -P /opt/admins.py")
    before = one.sh(listed)
    assert "/run/wireguard/wg0.sock root 700\n" in before
    try:
        one.sh(f"umask 077; nsmctl systemd install; {START}")
        assert one.active(*UNITS)
        assert one.sh(listed) == before
        pid = one.main_pid("vwire-forwarder")
        assert one.sh(f"ls /proc/{pid}/root/run/wireguard") == ""  # none of it is seen there
    finally:
        one.sh("nsmctl systemd uninstall --purge")
        assert one.sh(listed) == before
        one.sh("rm -r /run/wireguard")


def test_where_systemd_is_installed_and_does_not_run_nothing_is_written(one):
    """As in most containers."""
    said = one.sh(
        "unshare --mount bash -c 'mount -t tmpfs tmpfs /run; code=0;"
        " for verb in install uninstall; do"
        " nsmctl systemd $verb || code=$?; echo exit $code; done;"
        ' find /etc -name "*vwire*"\''
    )
    assert said.count("no systemd runs this machine") == 2
    assert said.count("exit 3\n") == 2
    assert "/etc" not in said


def test_who_is_not_root_is_told_what_to_type(one):
    nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups"
    said = one.sh(f"code=0; {nobody} nsmctl systemd install || code=$?; echo exit $code")
    assert "sudo /opt/vwire/bin/python -P -m nsmctl systemd install" in said
    assert said.endswith("exit 3\n")
    one.sh(f"{nobody} nsmctl systemd --help")
