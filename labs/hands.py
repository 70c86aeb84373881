"""Orders to probes and couriers: one process in each namespace that is asked, kept for later."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Self

from labs import processes
from nsm.errors import InternalError


class Hands:
    """The probes of one run. Asks many namespaces at once and waits for all answers.

    module is the program that obeys there: one order a line, one answer a line.
    """

    def __init__(self, module: str = "labs.probe") -> None:
        self._module = module
        self._probes: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for probe in self._probes.values():
            assert probe.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                probe.stdin.close()
        for probe in self._probes.values():
            try:
                probe.wait(1)
            except subprocess.TimeoutExpired:
                probe.kill()
                probe.wait()
            assert probe.stdout is not None
            probe.stdout.close()

    def ask(self, orders: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Give each namespace its order; the answers by namespace. Raises FailedError."""
        for namespace, order in orders.items():
            self.tell(namespace, order)
        return {namespace: self.hear(namespace) for namespace in orders}

    def tell(self, namespace: str, order: Mapping[str, Any]) -> None:
        """Give an order; `hear` has its answer."""
        probe = self._probe(namespace)
        assert probe.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then `hear` says so
            probe.stdin.write(json.dumps(order) + "\n")
            probe.stdin.flush()

    def hear(self, namespace: str) -> Any:
        """The answer to the oldest order that has none yet. Raises FailedError."""
        probe = self._probes[namespace]
        assert probe.stdout is not None
        line = probe.stdout.readline()
        if not line:
            del self._probes[namespace]
            assert probe.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # of the order that it did not read
                probe.stdin.close()
            probe.stdout.close()
            status = probe.wait()
            raise EndedError(f"{self._module} in {namespace} ended with status {status}")
        told = json.loads(line)
        if "failure" in told:
            raise FailedError(f"{namespace}: {told['failure']}")
        return told["answer"]

    def drop(self, namespace: str) -> None:
        """End a probe that waits for what will not come; the next order has a new one."""
        probe = self._probes.pop(namespace, None)
        if probe:
            probe.kill()
            probe.communicate()

    def _probe(self, namespace: str) -> "subprocess.Popen[str]":
        if namespace not in self._probes:
            here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
            self._probes[namespace] = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module, namespace],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", text=True,
                start_new_session=True, env={"PATH": processes.PATH, "PYTHONPATH": here},
            )  # fmt: skip
        return self._probes[namespace]


class EndedError(InternalError):
    """Whoever was asked is no more: its namespace was ended, or somebody killed it."""


class FailedError(Exception):
    """The network said no to a probe: what it was told, in the kernel's words."""
