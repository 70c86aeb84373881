"""The issuer as a program, asked by the public `spiffe` package and by stock grpcio."""

import asyncio
import hashlib
import os
import shutil
import signal
import site
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from nsm.identity.workload import workload_source
from tests.e2e.identity.running import CALLER, Place, Running, running
from tests.support.wait import until

ME = {"id": "me", "uid": 0}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "td")


@pytest.fixture
async def issuer(place: Place) -> AsyncIterator[Running]:
    place.register(ME)
    async with place.issuer() as process:
        yield process


def ids(said: list[dict[str, Any]]) -> list[str]:
    return [svid["id"].removeprefix("spiffe://td.example/") for svid in said[0].get("svids", [])]


async def test_a_workload_is_told_who_it_is(place: Place, issuer: Running) -> None:
    (told,) = await place.ask()
    assert told["default"] == "spiffe://td.example/me"
    assert told["bundles"] == told["all_bundles"] == {"td.example": 1}
    (svid,) = told["svids"]
    assert 3500 < svid["end"] - svid["begin"] < 3700


async def test_openssl_verifies_what_a_workload_was_given(
    place: Place, issuer: Running, tmp_path: Path
) -> None:
    async with workload_source(place.url, patience=10) as source:
        (tmp_path / "leaf.pem").write_bytes(source.identity.svid.chain_pem())
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver"]
    command += ["-CAfile", str(place.bundle), str(tmp_path / "leaf.pem")]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)


async def test_all_selectors_of_an_entry_must_hold(place: Place) -> None:
    place.register(
        {"id": "user", "uid": 12345},
        {"id": "group", "gid": 54321},
        {"id": "both", "uid": 12345, "gid": 54321},
        {"id": "root", "uid": 0, "gid": 0},
    )
    async with place.issuer():
        user, both, root, nobody = await asyncio.gather(
            place.ask("fetch", "--uid", "12345", "--gid", "1"),
            place.ask("fetch", "--uid", "12345", "--gid", "54321"),
            place.ask(),
            place.ask("fetch", "--uid", "4", "--gid", "4"),
        )
    assert ids(user) == ["user"]
    assert ids(both) == ["user", "group", "both"]
    assert ids(root) == ["root"]
    assert "PERMISSION_DENIED" in nobody[0]["refused"] or "fits this caller" in nobody[0]["refused"]


async def test_a_refusal_says_what_was_seen(place: Place, issuer: Running) -> None:
    with pytest.raises(Exception, match="no registration entry") as refused:
        await as_user(place, 4321)
    assert "uid 4321, gid 4321" in str(refused.value)
    assert f"net:[{os.stat('/proc/self/ns/net').st_ino}]" in str(refused.value)
    assert "register this process" in str(refused.value)


async def as_user(place: Place, user: int) -> None:
    """Ask with our own client in a process of that user; raises what it says."""
    code = (
        "import asyncio, os, sys\n"
        "from nsm.identity.workload import workload_source\n"
        "async def main():\n"
        "    async with workload_source(sys.argv[1], patience=1) as source:\n"
        "        print(source.identity.svid.id)\n"
        "os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))\n"
        "asyncio.run(main())\n"
    )
    async with running(sys.executable, "-c", code, place.url, str(user)) as process:
        await process.process.wait()
    raise RuntimeError(process.log[-1])


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"vw-id-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield f"/run/netns/{name}"
    subprocess.run(["ip", "netns", "del", name], check=True)


async def test_callers_in_other_network_namespaces_are_told_apart(
    place: Place, namespace: str
) -> None:
    number = os.stat(namespace).st_ino
    place.register(
        {"id": "by-file", "netns": namespace},
        {"id": "by-number", "netns": f"net:[{number}]"},
        {"id": "host", "netns": "/proc/self/ns/net"},
    )
    async with place.issuer():
        inside, outside, elsewhere = await asyncio.gather(
            place.ask("fetch", "--netns", namespace),
            place.ask(),
            place.ask("fetch", "--netns", "new"),
        )
    assert ids(inside) == ["by-file", "by-number"]
    assert ids(outside) == ["host"]
    assert "refused" in elsewhere[0]


@pytest.fixture
def cgroup() -> Iterator[tuple[str, str]]:
    """A new cgroup: its directory, and its path as /proc/<pid>/cgroup has it."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [m[1] for m in mounts if m[2] == "cgroup2"] or [
        m[1] for m in mounts if m[2] == "cgroup" and "pids" in m[3].split(",")
    ]
    if not roots:
        pytest.skip("kernel lacks cgroups")
    name = f"vw-id-{uuid.uuid4().hex[:8]}"
    directory = Path(roots[0]) / name
    (directory / "inner").mkdir(parents=True)
    yield str(directory / "inner"), f"/{name}"
    (directory / "inner").rmdir()
    directory.rmdir()


async def test_callers_of_a_cgroup_and_below_are_known(
    place: Place, cgroup: tuple[str, str]
) -> None:
    directory, path = cgroup
    place.register(
        {"id": "in", "cgroup": path},
        {"id": "below", "cgroup": f"{path}/inner"},
        {"id": "beside", "cgroup": path[:-1]},
    )
    async with place.issuer():
        inside, outside = await asyncio.gather(
            place.ask("fetch", "--cgroup", directory), place.ask()
        )
    assert ids(inside) == ["in", "below"]
    assert "refused" in outside[0]


async def test_a_compiled_programs_digest_is_known(place: Place, tmp_path: Path) -> None:
    compiled = tmp_path / "compiled"
    shutil.copy(os.path.realpath(sys.executable), compiled)
    digest = hashlib.sha256(compiled.read_bytes()).hexdigest()
    place.register({"id": "program", "uid": 0, "exe-sha256": digest})
    packages = {"PYTHONHOME": sys.base_prefix, "PYTHONPATH": site.getsitepackages()[0]}
    async with place.issuer():
        as_program, as_script = await asyncio.gather(
            place.ask(program=str(compiled), **packages), place.ask()
        )
    assert ids(as_program) == ["program"]
    assert "runs what others wrote" in as_script[0]["refused"]


async def test_an_entry_that_newly_asks_for_a_digest_is_asked_of_open_streams(
    place: Place, tmp_path: Path
) -> None:
    compiled = tmp_path / "compiled"
    shutil.copy(os.path.realpath(sys.executable), compiled)
    digest = hashlib.sha256(compiled.read_bytes()).hexdigest()
    packages = {"PYTHONHOME": sys.base_prefix, "PYTHONPATH": site.getsitepackages()[0]}
    place.register(ME)
    caller = running(str(compiled), CALLER, "stream", place.url, environ=packages)
    async with place.issuer(), caller as asking:
        await until(lambda: asking.said, "the first answer", bar=2)
        place.register({"id": "program", "uid": 0, "exe-sha256": digest})
        await until(lambda: len(asking.said) > 1, "the answer by digest", bar=2)
    assert asking.said[1]["svid"]["id"] == "spiffe://td.example/program"


async def test_a_connection_handed_to_another_process_is_worth_nothing(
    place: Place, issuer: Running
) -> None:
    (told,) = await place.ask("pass_on")
    assert told["status"] == "7"
    assert "has ended" in told["text"]


async def test_certificates_are_renewed_on_the_stream(place: Place) -> None:
    place.register({**ME, "renew": "1s", "ttl": "10m"})
    async with place.issuer(), place.asking("stream") as caller:
        await until(lambda: len(caller.said) >= 3, "two renewals of a certificate", bar=3)
    serials = [update["svid"]["serial"] for update in caller.said]
    assert len(set(serials)) == len(serials)
    ends = [update["svid"]["end"] for update in caller.said]
    assert ends == sorted(ends)
    assert ends[-1] > ends[0]


async def test_our_client_follows_renewals(place: Place) -> None:
    place.register({**ME, "renew": "1s", "ttl": "10m"})
    async with place.issuer(), workload_source(place.url, patience=10) as source:
        first = source.identity
        second = await asyncio.wait_for(source.changed(first), 10)
        assert second.svid.id == first.svid.id
        assert second.svid.leaf != first.svid.leaf
        assert second.bundles == first.bundles


async def test_a_changed_registration_is_told_on_the_stream(place: Place, issuer: Running) -> None:
    async with place.asking("stream") as caller:
        await until(lambda: caller.said, "the first answer", bar=2)
        place.register({"id": "other", "uid": 0})
        await until(lambda: len(caller.said) > 1, "the new identity", bar=2)
        assert caller.said[1]["svid"]["id"] == "spiffe://td.example/other"
        place.register({"id": "other", "uid": 1})
        await until(lambda: len(caller.said) > 2, "the end of the stream", bar=2)
        assert "PERMISSION_DENIED" in caller.said[2]["ended"]


async def test_a_registration_gone_wrong_leaves_the_last_good_one(
    place: Place, issuer: Running
) -> None:
    place.entries.write_text("- id: spiffe://td.example/x\n  uuid: 1\n")
    await until(
        lambda: any(f"{place.entries}:2:" in line for line in issuer.log), "the complaint", bar=2
    )
    assert ids(await place.ask()) == ["me"]


async def test_bundles_of_other_domains_are_served_and_followed(
    place: Place, tmp_path: Path
) -> None:
    other = Place(tmp_path / "other", "other.example")
    place.register(ME)
    other.register(ME)
    (place.federation / "README").write_text("no bundle")
    (place.federation / "Not A Domain.pem").write_text("no bundle")
    async with place.issuer(), other.issuer(), place.asking("stream") as caller:
        await until(lambda: caller.said, "the first answer", bar=2)
        assert caller.said[0]["bundles"] == {"td.example": 1}
        shutil.copy(other.bundle, place.federation / "other.example.pem")
        await until(lambda: len(caller.said) > 1, "the federated bundle", bar=2)
        both = {"td.example": 1, "other.example": 1}
        assert caller.said[1]["bundles"] == both
        (told,) = await place.ask()
        assert told["all_bundles"] == both
        async with workload_source(place.url, patience=10) as source:
            assert set(source.identity.bundles) == set(both)
        (place.federation / "other.example.pem").write_text("broken")
        (place.federation / "third.example.pem").write_bytes(other.bundle.read_bytes())
        await until(lambda: len(caller.said) > 2, "another federated bundle", bar=2)
        assert caller.said[2]["bundles"] == {**both, "third.example": 1}
        (place.federation / "other.example.pem").unlink()
        await until(lambda: len(caller.said) > 3, "the end of the federation", bar=2)
        assert caller.said[3]["bundles"] == {"td.example": 1, "third.example": 1}


async def test_jwt_svids_are_refused_in_a_sentence(place: Place, issuer: Running) -> None:
    said = await place.ask("jwt")
    assert len(said) == 3
    assert all("X.509-SVIDs only" in told["refused"] for told in said)


async def test_hostile_callers_are_bounded(place: Place, issuer: Running) -> None:
    before = pss(issuer)
    bare, huge, many = await place.ask("raw")
    assert bare["code"] == "INVALID_ARGUMENT"
    assert "workload.spiffe.io: true" in bare["text"]
    assert huge.get("answered") or huge["code"] in ("DEADLINE_EXCEEDED", "UNKNOWN")
    assert many["codes"] == ["RESOURCE_EXHAUSTED"]
    assert pss(issuer) - before < 8 * 1024
    assert ids(await place.ask()) == ["me"]


def pss(process: Running) -> int:
    """KiB."""
    rollup = Path(f"/proc/{process.process.pid}/smaps_rollup").read_text()
    return int(next(line.split()[1] for line in rollup.splitlines() if line.startswith("Pss:")))


async def test_one_user_cannot_take_all_connections(place: Place) -> None:
    place.register(ME)
    taken: list[socket.socket] = []

    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        taken.append(sock)
        sock.settimeout(10)
        sock.connect(str(place.socket))
        return sock

    def is_refused(sock: socket.socket) -> bool:
        try:
            return sock.recv(1) == b""
        except ConnectionResetError:
            return True

    async with place.issuer(under=("prlimit", "--nofile=640:640")):
        try:
            for _ in range(64):  # a quarter of what 640 files allow
                await asyncio.to_thread(connect)
            assert await asyncio.to_thread(is_refused, await asyncio.to_thread(connect))
            with pytest.raises(Exception, match="no registration entry"):
                await as_user(place, 4321)
        finally:
            for sock in taken:
                sock.close()
        assert ids(await place.ask()) == ["me"]


async def test_stopping_tells_every_stream(place: Place) -> None:
    place.register(ME)
    async with place.issuer() as process, place.asking("stream") as caller:
        await until(lambda: caller.said, "the first answer", bar=2)
        process.process.send_signal(signal.SIGTERM)
        await until(lambda: len(caller.said) > 1, "the end of the stream", bar=2)
        assert "UNAVAILABLE" in caller.said[1]["ended"]
        assert await asyncio.wait_for(process.process.wait(), 10) == 0
    assert not place.socket.exists()


async def test_a_restart_loses_nobody(place: Place) -> None:
    place.register(ME)
    async with place.issuer() as process, workload_source(place.url, patience=10) as source:
        first = source.identity
        process.process.kill()
        await process.process.wait()
        assert source.identity is first
        async with place.issuer():  # over the socket that was left behind
            again = await asyncio.wait_for(source.changed(first), 10)
            assert again.bundles == first.bundles
            assert again.svid.leaf != first.svid.leaf


async def test_a_second_issuer_is_refused(place: Place, issuer: Running) -> None:
    async with running(
        sys.executable, "-P", "-m", "nsm.process.issuer", environ=place.environ
    ) as second:
        assert await asyncio.wait_for(second.process.wait(), 20) == 1
    assert f"somebody else has {place.socket}" in "".join(second.log)
    assert ids(await place.ask()) == ["me"]


async def test_a_file_in_the_sockets_place_is_left_alone(place: Place) -> None:
    place.register(ME)
    place.socket.write_text("precious")
    async with running(
        sys.executable, "-P", "-m", "nsm.process.issuer", environ=place.environ
    ) as process:
        assert await asyncio.wait_for(process.process.wait(), 20) == 1
    assert place.socket.read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"NSM_TRUST_DOMAIN": "TD"}, 2, "no trust domain's name"),
        ({"NSM_LISTEN_ON": "tcp://127.0.0.1:1"}, 2, "no socket of a Workload API"),
        ({"NSM_LISTEN_ON": f"unix:///{'x' * 200}"}, 2, "longer than a unix socket's"),
        ({"NSM_SVID_TTL": "1m"}, 2, "expected 600 s"),
        ({"NSM_ENTRIES": "/nowhere/entries.yaml"}, 3, "/nowhere/entries.yaml"),
        ({"NSM_ISSUER_DIR": "/proc/issuer"}, 3, "/proc/issuer"),
    ],
)
async def test_wrong_settings_end_in_a_sentence(
    place: Place, change: dict[str, str], code: int, words: str
) -> None:
    place.register(ME)
    async with running(
        *(sys.executable, "-P", "-m", "nsm.process.issuer"), environ={**place.environ, **change}
    ) as process:
        assert await asyncio.wait_for(process.process.wait(), 20) == code
    assert words in "".join(process.log)
    assert "Traceback" not in "".join(process.log)


async def test_no_key_reaches_the_log(place: Place) -> None:
    place.register({**ME, "renew": "1s"})
    async with place.issuer(NSM_LOG_LEVEL="TRACE") as process:
        await place.ask()
    log = "".join(process.log)
    assert "spiffe://td.example/me" in log
    pem = (place.directory / "issuer" / "authority.pem").read_text()
    assert pem.splitlines()[1] not in log
    assert "PRIVATE" not in log
