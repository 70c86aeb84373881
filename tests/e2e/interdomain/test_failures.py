"""What a client is told where another domain cannot be had: what, whose, where, what to do."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.interdomain.domains import Domains, tcp
from tests.support.wait import until

QUICK = {"NSM_PATIENCE": "100ms", "NSM_REQUEST_TIMEOUT": "8s"}


def refused(mesh: Domains, url: str, code: str, *words: str) -> str:
    """That a client of domain one is refused with that code and these words; the whole text."""
    manager = mesh.now["a/nsmgr"]
    offset = manager.log_file.stat().st_size
    late = mesh.asks("app", url, **QUICK)
    assert late.ended() != 0
    assert mesh.space("app").links() == set()
    calls = [one for one in manager.after(offset) if one.get("method", "").endswith("/Request")]
    text = late.words
    print(calls[-1]["code"], text)
    assert calls[-1]["code"] == code, text
    missing = [one for one in words if one not in text]
    assert not missing, f"{missing} not in: {text}"
    assert "Traceback" not in text
    assert "eyJ" not in text, "a token is in it"
    return text


NAMELESS = """
server:
  directory: "{0}"
  chroot: ""
  username: ""
  pidfile: ""
  use-syslog: no
  interface: 127.0.0.1
  do-daemonize: no
  local-zone: "." static
remote-control:
  control-enable: no
"""


@pytest.fixture
def nameless(mesh: Domains, tmp_path: Path) -> Iterator[Domains]:
    """A DNS server that knows no name at all, and is asked by domain one."""
    config = tmp_path / "unbound.conf"
    config.write_text(NAMELESS.format(tmp_path))
    inside = ["ip", "netns", "exec", mesh.space("a").name]
    server = subprocess.Popen([*inside, "unbound", "-d", "-c", config], stderr=subprocess.DEVNULL)
    assert mesh.now["a/registry-proxy"].end() == 0
    mesh.start("a/registry-proxy", NSM_DNS_SERVERS="127.0.0.1").ready()
    yield mesh
    server.terminate()
    server.wait(10)
    assert mesh.now["a/registry-proxy"].end() == 0
    mesh.start("a/registry-proxy").ready()


async def test_a_domain_that_nobody_knows(nameless: Domains):
    def listening() -> bool:
        return ":53" in nameless.space("a").run("ss", "-Hlun").stdout

    await until(listening, "the DNS server", bar=1, record=False)
    words = "domain 'nowhere'", "registry.nsm-system.nowhere", "NSM_DOMAINS_PATH"
    refused(nameless, "kernel://frames@nowhere/nsm-1", "NOT_FOUND", *words)


async def test_a_domain_that_nobody_can_be_asked_about(mesh: Domains):
    refused(
        mesh, "kernel://frames@nowhere/nsm-1", "UNAVAILABLE",
        "domain 'nowhere'", "DNS", "NSM_DOMAINS_PATH",
    )  # fmt: skip


async def test_a_service_that_the_other_domain_does_not_have(mesh: Domains):
    refused(
        mesh, "kernel://nothing@two/nsm-1", "NOT_FOUND",
        "network service nothing@two", "is not found", "in domain 'two'",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("victim", "words"),
    [
        ("a/nsmgr-proxy", ("the proxy for other domains at", tcp("a", 5004))),
        ("a/registry-proxy", ("the registry-proxy at", tcp("a", 5005))),
        ("b/registry", ("registry of domain 'two'", tcp("b", 5002))),
        ("b/nsmgr-proxy", ("the nsmgr-proxy of domain 'two'", tcp("b", 5004))),
        ("b/nsmgr", ("the manager of endpoint pong", tcp("b", 5001))),
    ],
)
async def test_somebody_on_the_way_is_down(mesh: Domains, victim: str, words: tuple[str, ...]):
    assert mesh.now[victim].end() == 0
    try:
        refused(mesh, "kernel://frames@two/nsm-1", "UNAVAILABLE", "onnection refused", *words)
    finally:
        mesh.start(victim).ready()
    app = await up_again(mesh)
    assert app.end() == 0


async def up_again(mesh: Domains):
    """A client has its wire, once all has come back that was away."""
    began = []

    def up() -> bool:
        began.append(mesh.asks("app", "kernel://frames@two/nsm-1", **QUICK))
        mesh.hear(lambda: began[-1].said is not None or began[-1].status is not None, 20.0)
        return began[-1].said is not None

    await until(up, "a wire again", bar=3)
    return began[-1]


@pytest.mark.parametrize("who", ["one", "two"], ids=["they-are-strangers-here", "we-are-there"])
async def test_a_domain_that_is_not_federated(mesh: Domains, who: str):
    """who does not know the other's identities: neither its registry nor its proxy is believed."""
    other = {"one": "two", "two": "one"}[who]
    file = mesh.bundle_file(who, other)
    bundle = file.read_bytes()
    file.unlink()
    issuer = mesh.now["a/issuer" if who == "one" else "b/issuer"]
    looked = '"event": "read again"'
    before = sum(looked in line for line in issuer.log)
    try:
        await until(
            lambda: sum(looked in line for line in issuer.log) > before, "the issuer sees it", bar=2
        )

        def strange() -> bool:
            try:
                refused(mesh, "kernel://frames@two/nsm-1", "UNAUTHENTICATED", "domain 'two'")
            except AssertionError as not_yet:
                print(not_yet)
                return False
            return True

        await until(strange, "they are strangers", bar=3)
    finally:
        file.write_bytes(bundle)
    app = await up_again(mesh)
    assert app.end() == 0
