"""What a forwarder with some rights can do, tried out on two machines."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from tests.e2e.systemd.machine import Machine, wait
from tests.e2e.systemd.mesh import Standing

UNIT = "vwire-forwarder"
FOLDER = f"/etc/systemd/system/{UNIT}.service.d"
CLIENT = "nsm.process.client"
# What a forwarder cannot close ends by itself, some time after a test.
PATIENCE = {
    "NSM_PATIENCE": "1500ms",
    "NSM_REQUEST_TIMEOUT": "1500ms",
    "NSM_MAX_TOKEN_LIFETIME": "15s",
}
BEFORE = ("near", "app", "sealed")  # the wires that are there when a forwarder starts
# The program without what it asks itself at the start, so that what comes of it is seen.
UNASKED = """
from forwarder import rights
rights.check = lambda *_: None
from forwarder.__main__ import main
raise SystemExit(main())
"""


@contextmanager
def dropped(one: Machine, rights: Collection[str], *, asked: bool) -> Iterator[None]:
    """The forwarder's unit gives it these capabilities only, for the block. It is not started."""
    held = " ".join(sorted(rights))
    words = [f"{kind}=\n{kind}={held}" for kind in ("CapabilityBoundingSet", "AmbientCapabilities")]
    if not asked:
        words.append("ExecStart=\nExecStart=/opt/vwire/bin/python -P /opt/unasked.py")
        one.sh(f"cat >/opt/unasked.py <<'END'{UNASKED}END")
    text = "\n".join(["[Service]", "Restart=no", "TimeoutStartSec=30s", *words])
    one.sh(f"mkdir -p {FOLDER}; cat >{FOLDER}/rights.conf <<'END'\n{text}\nEND")
    one.run("systemctl", "daemon-reload")
    try:
        yield
    finally:
        one.sh(f"rm -r {FOLDER}; systemctl daemon-reload; systemctl restart {UNIT}")


class Tried:
    """Each thing a forwarder is for, tried once; `failed` says which did not work, and how.

    Made while the forwarder has all its rights, for there must be wires that it then finds.
    """

    def __init__(self, east: Machine, west: Machine) -> None:
        self.failed: dict[str, str] = {}
        self._east, self._west = east, west
        self._ends = self._far_ends()
        self._client("near", "echo")
        self._client("app", "far")
        self._client("sealed", "sealed")
        self._before = Standing(east, west, *BEFORE)

    def everything(self) -> dict[str, str]:
        """Try all of it; what failed."""
        if self._holds("start", self._start):
            self._holds("wires of before", self._adopt)
            self._holds("a wire on this node", self._local)
            self._holds("a wire between nodes", self._remote)
            self._holds("an encrypted wire", self._encrypted)
            self._holds("a tunnel kept from who may misuse it", self._hop)
            self._holds("the end of a workload", self._death)
            self._holds("close", self._close)
        return self.failed

    def clear(self) -> None:
        """Nobody is there any more who had wires; while the forwarder has all its rights."""
        self._east.sh("systemctl stop app near sealed extra more safe root 2>/dev/null || true")
        wait(lambda: self._far_ends() == self._ends, "all wires closed", bar=3)

    def _holds(self, what: str, attempt: Callable[[], None]) -> bool:
        try:
            attempt()
        except (AssertionError, StopIteration, KeyError) as failure:
            self.failed[what] = str(failure)
        return what not in self.failed

    def _far_ends(self) -> tuple[int, int, int]:
        """How many wires end at each endpoint."""
        ends = ((self._east, "pong"), (self._west, "far"), (self._west, "vault"))
        near, far, vault = (len(one.links(unit)) for one, unit in ends)
        return near, far, vault

    def _client(self, unit: str, service: str, *properties: str) -> str:
        """A wire of that unit's, which answers; the kind of its device."""
        urls = f"kernel://{service}/nsm-1"
        self._east.start(unit, CLIENT, *properties, NSM_NETWORK_SERVICES=urls, **PATIENCE)
        assert self._east.pings(unit), f"{unit} has no answer"
        kind: str = self._east.link(unit)["linkinfo"]["info_kind"]
        return kind

    def _start(self) -> None:
        self._east.run("systemctl", "restart", UNIT)

    def _adopt(self) -> None:
        self._before.refreshed(UNIT)
        assert not (changed := self._before.changed()), f"made anew: {changed}"
        assert all(self._east.pings(unit) for unit in BEFORE), "a wire has no answer"
        said = self._east.show(UNIT, "StatusText")
        assert said.endswith(f"; wires {len(BEFORE)}"), said

    def _local(self) -> None:
        kind = self._client("extra", "echo")
        assert kind == "veth", f"a {kind}"

    def _remote(self) -> None:
        kind = self._client("more", "far")
        assert kind == "vxlan", f"a {kind}"

    def _encrypted(self) -> None:
        kind = self._client("safe", "sealed")
        assert kind == "tun", f"a {kind}"

    def _hop(self) -> None:
        kind = self._client("root", "far", "DynamicUser=no")
        assert kind == "macvlan", f"root of a workload holds the {kind} itself"

    def _death(self) -> None:
        before = self._far_ends()[1]
        self._east.run("systemctl", "kill", "--signal=KILL", "app")
        wait(lambda: self._far_ends()[1] < before, "a workload's death seen afar", bar=0.5)

    def _close(self) -> None:
        before = self._far_ends()[0]
        self._east.run("systemctl", "stop", "near")
        wait(lambda: self._far_ends()[0] < before, "the near end closed", bar=0.5)
