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
    UnavailableError,
    UnsupportedError,
)
from nsm.kernel import trial
from nsm.kernel import wireguard_go as userspace
from nsm.kernel.namespaces import have_handles
from nsmctl import show
from nsmctl.machine.asking import Answer, bad, not_tried, note, ok, when_idle

LET_MAKE: Final = "let this container make namespaces"
RAISE_LIMIT: Final = "raise /proc/sys/user/max_net_namespaces"
LET_SET: Final = "give this container CAP_NET_ADMIN"
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
    spare = missing == ["CAP_SYS_PTRACE"] and have_handles()
    hop = ", or set NSM_ISOLATION=hop" if spare else ""
    return bad(told, f"give it to the container or service this runs in{hop}")


def namespaces() -> Answer:
    """Network namespaces, entered, left and named."""
    try:
        trial.namespace()
    except ExhaustedError as full:
        return bad(f"no more of them: {full.message}", RAISE_LIMIT)
    except RightsError as refusal:
        return _not_tried(refusal, needed=True, fix="allow mount and unshare to the container")
    return ok("made, entered, named")


def settings() -> Answer:
    """Variables of a namespace can be set."""
    try:
        trial.apart()
    except NsmError as refusal:
        return _no_place(refusal, needed=True)
    try:
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
        return _no_place(refusal, needed=True)
    try:
        if _kernel_has_wireguard():
            return ok("in the kernel")
    except NsmError as refusal:
        return _refused(refusal, needed=True)
    try:
        program = userspace.find_program()
    except PreconditionError:
        return bad("neither in the kernel nor as wireguard-go: no encrypted wires", WIREGUARD_FIX)
    try:
        trial.tun()
        trial.wireguard_go(program)
    except RightsError as refusal:
        return _not_tried(refusal, needed=True, fix=f"modprobe wireguard, or {refusal.hint}")
    except UnavailableError as late:
        return note(f"no kernel module, and {late.message}", f"{when_idle()}; {WIREGUARD_FIX}")
    except NsmError as refusal:
        return bad(f"no kernel module, and {refusal.message}: no encrypted wires", WIREGUARD_FIX)
    return note("userspace (no kernel module)", "modprobe wireguard")


def hop() -> Answer:
    """Encrypted wires for workloads that could read a key."""
    try:
        trial.apart()
    except NsmError as refusal:
        return _no_place(refusal, needed=False)
    try:
        trial.veth()  # what it is of: if there is none of that, it is not the program's fault
    except NsmError as refusal:
        return _refused(refusal, needed=False)
    try:
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
    except NsmError as refusal:
        return _no_place(refusal, needed=False)
    try:
        trial.tun()
    except UnsupportedError as lacking:
        try:
            if _kernel_has_wireguard():
                return ok("none, and none is needed: the kernel has WireGuard")
        except NsmError as refusal:
            return _refused(refusal, needed=False, before=f"{lacking.message}; is it needed? ")
        return note(
            f"{lacking.message}: no WireGuard in userspace",
            "modprobe tun; in a container, mount /dev/net/tun",
        )
    except RightsError as refusal:
        return _not_tried(refusal, needed=False, fix=refusal.hint)
    return ok(trial.TUN)


def wireguard_go() -> Answer:
    """The program that is WireGuard where the kernel is not."""
    try:
        path = userspace.find_program()
    except PreconditionError:
        return _without_program()
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


def _without_program() -> Answer:
    lacking = "not installed"
    try:
        trial.apart()
    except NsmError as refusal:
        return _no_place(refusal, needed=False, before=f"{lacking}; is it needed? ")
    try:
        if _kernel_has_wireguard():
            return ok("none, and none is needed: the kernel has WireGuard")
    except NsmError as refusal:
        return _refused(refusal, needed=False, before=f"{lacking}; is it needed? ")
    return note(lacking, "apt install wireguard-go")


def _tried(attempt: Callable[[], None], what_for: str, fix: str, *, needed: bool = False) -> Answer:
    try:
        trial.apart()
    except NsmError as refusal:
        return _no_place(refusal, needed=needed)
    try:
        attempt()
    except UnsupportedError:
        return (bad if needed else note)(f"the kernel has none: no {what_for}", fix)
    except NsmError as refusal:
        return _refused(refusal, needed=needed)
    return ok(f"for {what_for}")


def _no_place(refusal: NsmError, *, needed: bool, before: str = "") -> Answer:
    """What it means that there is no namespace to try in."""
    if isinstance(refusal, ExhaustedError):
        found = f"{before}no more namespaces to try in: {refusal.message}"
        return (bad if needed else note)(found, RAISE_LIMIT)
    return _not_tried(refusal, needed=needed, fix=LET_MAKE, before=before)


def _refused(refusal: NsmError, *, needed: bool, before: str = "") -> Answer:
    """What it means that the kernel did not make what was asked of it by netlink."""
    if isinstance(refusal, RightsError):
        return _not_tried(refusal, needed=needed, fix=LET_SET, before=before)
    return (bad if needed else note)(f"{before}{refusal.message}", refusal.hint)


def _not_tried(refusal: NsmError, *, needed: bool, fix: str, before: str = "") -> Answer:
    """What a refusal means: for an ordinary user nothing, for root that it is not to be had."""
    if os.geteuid() != 0:
        return not_tried()
    return (bad if needed else note)(f"{before}{refusal.message}", fix)


def _kernel_has_wireguard() -> bool:
    """Whether the kernel makes such a device; raises what else keeps it from telling."""
    try:
        trial.wireguard()
    except UnsupportedError:
        return False
    return True
