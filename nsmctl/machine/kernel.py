"""What the kernel can do, and what it lets this process do."""

import os
import subprocess
from collections.abc import Callable
from typing import Final

from forwarder import rights
from nsm.errors import (
    ExhaustedError,
    NsmError,
    PreconditionError,
    RightsError,
    UnsupportedError,
)
from nsm.kernel import trial
from nsm.kernel import wireguard_go as userspace
from nsmctl import show
from nsmctl.machine.asking import Answer, bad, not_tried, note, ok

LET_MAKE: Final = "let this container make namespaces"
WIREGUARD_FIX: Final = "modprobe wireguard, or apt install wireguard-go"


def capabilities() -> Answer:
    """What this process may do, of what a forwarder needs, and a lab."""
    with open(rights.STATUS) as file:
        held = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    missing = [name for name, bit in rights.NEEDED.items() if not held >> bit & 1]
    if not missing:
        return ok(", ".join(rights.NEEDED))
    if os.geteuid() != 0:
        lacks = f"user {os.geteuid()} lacks {', '.join(missing)}"
        return bad(lacks, show.again_as_root())
    told = "; ".join(f"no {name}: {rights.WITHOUT[name]}" for name in missing)
    hop = ", or set NSM_ISOLATION=hop" if missing == ["CAP_SYS_PTRACE"] else ""
    return bad(told, f"give it to the container or service this runs in{hop}")


def namespaces() -> Answer:
    """Network namespaces, entered, left and named."""
    try:
        trial.namespace()
    except ExhaustedError as full:
        return bad(f"no more of them: {full.message}", "raise /proc/sys/user/max_net_namespaces")
    except RightsError as refusal:
        return _not_tried(refusal, needed=True, fix="allow mount and unshare to the container")
    return ok("made, entered, named")


def settings() -> Answer:
    """Variables of a namespace can be set."""
    try:
        trial.apart()
        trial.settings()
    except RightsError as refusal:
        return _not_tried(refusal, needed=True, fix="mount /proc/sys read-write")
    return ok("can be set")


def veth() -> Answer:
    """Wires on one node."""
    return _tried(trial.veth, "wires on one node", "modprobe veth", needed=True)


def bridge() -> Answer:
    """Switches of labs."""
    return _tried(trial.bridge, "switches of labs", "modprobe bridge", needed=True)


def vxlan() -> Answer:
    """Wires between nodes."""
    return _tried(trial.vxlan, "wires between nodes", "modprobe vxlan", needed=True)


def macvlan() -> Answer:
    """Wires of workloads that have rights over their devices."""
    return _tried(trial.macvlan, "remote wires for holders of CAP_NET_ADMIN", "modprobe macvlan")


def nft() -> Answer:
    """Filters of nf_tables."""
    return _tried(trial.nft, "faults in labs", "modprobe nf_tables")


def netem() -> Answer:
    """Delay and loss."""
    return _tried(trial.netem, "delay and loss in labs", "modprobe sch_netem")


def wireguard() -> Answer:
    """Encrypted wires between nodes."""
    try:
        trial.apart()
    except NsmError as refusal:
        return _not_tried(refusal, needed=True, fix=LET_MAKE)
    if _kernel_has_wireguard():
        return ok("in the kernel")
    try:
        program = userspace.find_program()
    except PreconditionError:
        return bad("neither in the kernel nor as wireguard-go: no encrypted wires", WIREGUARD_FIX)
    try:
        trial.tun()
        trial.wireguard_go(program)
    except RightsError as refusal:
        return _not_tried(refusal, needed=True, fix="modprobe wireguard")
    except NsmError as refusal:
        return bad(f"no kernel module, and {refusal.message}: no encrypted wires", WIREGUARD_FIX)
    return note("userspace (no kernel module)", "modprobe wireguard")


def hop() -> Answer:
    """Encrypted wires for workloads that could read a key."""
    try:
        trial.apart()
        trial.hop()
    except UnsupportedError as refusal:
        if not _kernel_has_wireguard():
            return ok("not to be had, and not needed: wireguard-go's device shows no key")
        return note(refusal.message, refusal.hint)
    except NsmError as refusal:
        return _not_tried(refusal, needed=False, fix="give this container CAP_BPF or CAP_SYS_ADMIN")
    return ok("for encrypted wires of holders of CAP_NET_ADMIN")


def tun() -> Answer:
    """What WireGuard in userspace stands on."""
    try:
        trial.apart()
        trial.tun()
    except UnsupportedError as refusal:
        if _kernel_has_wireguard():
            return ok("none, and none is needed: the kernel has WireGuard")
        return note(
            f"{refusal.message}: no WireGuard in userspace",
            "modprobe tun; in a container, mount /dev/net/tun",
        )
    except RightsError as refusal:
        return _not_tried(refusal, needed=False, fix=f"let this container use {trial.TUN}")
    return ok(trial.TUN)


def wireguard_go() -> Answer:
    """The program that is WireGuard where the kernel is not."""
    try:
        path = userspace.find_program()
    except PreconditionError:
        trial.apart()
        if _kernel_has_wireguard():
            return ok("none, and none is needed: the kernel has WireGuard")
        return note("not installed", "apt install wireguard-go")
    try:
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=False, timeout=2,
            preexec_fn=trial.end_with_parent,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as failure:
        return note(f"{path} does not say its version: {failure}", "apt install wireguard-go")
    lines = said.stdout.splitlines()
    if said.returncode != 0 or not lines:
        return note(f"{path} --version ended with {said.returncode}", "apt install wireguard-go")
    return ok(f"{lines[0].strip()[:40]}, {path}")


def _tried(attempt: Callable[[], None], what_for: str, fix: str, *, needed: bool = False) -> Answer:
    lacking = bad if needed else note
    try:
        trial.apart()
    except NsmError as refusal:
        return _not_tried(refusal, needed=needed, fix=LET_MAKE)
    try:
        attempt()
    except UnsupportedError:
        return lacking(f"the kernel has none: no {what_for}", fix)
    except RightsError as refusal:
        return _not_tried(refusal, needed=needed, fix="give this container CAP_NET_ADMIN")
    except NsmError as refusal:
        return lacking(refusal.message, refusal.hint)
    return ok(f"for {what_for}")


def _not_tried(refusal: NsmError, *, needed: bool, fix: str) -> Answer:
    """What a refusal means: for an ordinary user nothing, for root that it is not to be had."""
    if os.geteuid() != 0:
        return not_tried()
    return (bad if needed else note)(refusal.message, fix)


def _kernel_has_wireguard() -> bool:
    try:
        trial.wireguard()
    except NsmError:
        return False
    return True
