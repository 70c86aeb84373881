"""Two nodes with a supplier each, an address plan, and nobody else until somebody asks."""

import json
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from labs.processes import Plan, Process, ctl_gid
from tests.e2e.vl3.domain import DOMAIN, Domain
from tests.e2e.wires.nodes import ROOT, Program, two_nodes

SERVICE = "net"
AT = {"r1": "one", "r2": "two"}
LAB = two_nodes("""
name: ondemand
services:
  net:
    payload: ip
    endpoints:
      r1: {on: one, prefixes: [172.16.0.0/24]}
      r2: {on: two, prefixes: [172.16.0.0/24]}
clients:
  m1: {on: one, connect: ["kernel://net/nsm-1"]}
  m2: {on: one, connect: ["kernel://net/nsm-1"]}
  m3: {on: two, connect: ["kernel://net/nsm-1"]}
must-be-red: {up: "clients of a test are started by it"}
""")
FIRST_GID = 61_880
OPERATOR = "spiffe://east.test/node/one/nsmctl"
ENDING = 40  # seconds a router may take to end: ten times what it should


class Place(Domain):
    """The lab's nodes. Routers are started by suppliers and by nobody else."""

    MORE_MODULES = (*Domain.MORE_MODULES, "endpoints.supplier")

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, LAB)
        self.supplied = {name: self._supplier(router) for router, name in AT.items()}
        entries = [
            self._entry(f"supplier/{node}", process, node)
            for node, process in self.supplied.items()
        ]
        self.plan = Plan(self.plan.processes, (*self.plan.entries, *entries))

    def _supplier(self, router: str) -> Process:
        like, node = self.routers[router], AT[router]
        (self.directory / f"state-{node}").mkdir()
        kept = ("NSM_CONNECT_TO", "SPIFFE_ENDPOINT_SOCKET", "NSM_READY_FD", "NSM_LOG_LEVEL")
        environment = {
            name: value
            for name, value in like.environment.items()
            if name in kept or not name.startswith("NSM_")
        }
        return replace(
            like,
            name=f"{node}/supplier",
            module="endpoints.supplier",
            gid=FIRST_GID + len(AT[router]) + ord(router[-1]),
            environment={
                **environment,
                "NSM_NAME": f"supplier-{node}",
                "NSM_ROUTERS_FILE": str(self.directory / f"routers-{node}.json"),
                "NSM_STATE_DIR": str(self.directory / f"state-{node}"),
            },
        )

    def supply(self, node: str, *, idle: str = "0s", **more: str) -> Program:
        """Start a supplier whose router ends after so long without a member."""
        (name,) = (router for router, at in AT.items() if at == node)
        router = self.routers[name]
        environment = {
            "NSM_PREFIX_SERVER_URL": router.environment["NSM_PREFIX_SERVER_URL"],
            "NSM_POOL": SERVICE,
            "NSM_IDLE_TIMEOUT": idle,
            **more,
        }
        told = {
            "name": name,
            "namespace": self.space(name).path,
            "gid": router.gid,
            "log": str(self.log_of(name)),
            "environment": environment,
        }
        file = self.directory / f"routers-{node}.json"
        file.write_text(json.dumps({SERVICE: told}))
        file.chmod(0o644)
        return self.bear(self.supplied[node], f"supplier-{node}").ready()

    def log_of(self, router: str) -> Path:
        return self.directory / f"{router}.log"

    def pid(self, router: str) -> int:
        """The router's, as its supplier noted it; 0 where none is noted."""
        file = self.directory / f"state-{AT[router]}" / f"{router}.json"
        return int(json.loads(file.read_text())["pid"]) if file.exists() else 0

    def says(self, router: str, words: str) -> int:
        """How often a router, in all of its lives, said that."""
        log = self.log_of(router)
        return log.read_text().count(words) if log.exists() else 0

    def end_routers(self) -> None:
        """Whatever a test leaves running."""
        for router in AT:
            if pid := self.pid(router):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                    fd = os.pidfd_open(pid)
                    try:  # a router says goodbye to whom it cannot reach at once, too
                        assert select.select([fd], [], [], ENDING)[0], f"{router} does not end"
                    finally:
                        os.close(fd)
            self.log_of(router).unlink(missing_ok=True)

    def nsmctl(self, *line: str) -> str:
        """What `nsmctl` says on node one."""
        like = self.supplied["one"]
        manager = like.environment["NSM_CONNECT_TO"]
        program = self.bear(
            replace(
                like,
                gid=ctl_gid(self.lab, "one"),
                module="",
                argv=(sys.executable, "-P", "-m", "nsmctl", *line),
                environment={
                    "PATH": like.environment["PATH"],
                    "PYTHONPATH": str(ROOT),
                    "NSM_CONNECT_TO": manager,
                    "SPIFFE_ENDPOINT_SOCKET": like.environment["SPIFFE_ENDPOINT_SOCKET"],
                    "NSM_PREFIX_SERVER_URL": self.plans[SERVICE].environment["NSM_LISTEN_ON"],
                },
            ),
            "nsmctl",
        )
        code = program.ended()
        said = program.log_file.read_text()
        assert code == 0, said
        program.log_file.write_text("")  # it is no log, and no errors are in it
        return said

    def create(self) -> None:
        """The network, as an operator makes it, who then has its routers on demand."""
        prefixes = [word for one in DOMAIN.split(",") for word in ("--prefix", one)]
        create = ("vl3", "create", SERVICE, *prefixes)
        assert "made its pool and service\n" in self.nsmctl(*create)
        assert "made its service's matches\n" in self.nsmctl(*create, "--on-demand")
        assert "was there" in self.nsmctl(*create)

    def shown(self) -> dict[str, Any]:
        """What `nsmctl vl3 show` knows."""
        shown: dict[str, Any] = json.loads(self.nsmctl("vl3", "show", SERVICE, "--json"))
        return shown

    def requests(self, program: Program, member: str, since: int) -> Iterator[dict[str, Any]]:
        """The Requests of a member that a process has answered since its log was so long."""
        for line in program.after(since):
            its = line.get("caller", "").endswith(f"/client/{member}")
            if its and line["method"] == "networkservice.NetworkService/Request":
                yield line


def size(program: Program) -> int:
    """How long its log is."""
    return program.log_file.stat().st_size if program.log_file.exists() else 0
