"""Pods of a manifest without a kubelet: what a container is, is the kernel's doing.

Each container is a process in namespaces of its own, with the users, capabilities, volumes,
variables and the read-only files that its manifest says. Its root file system is this machine's,
seen through an overlay that goes with it; the image's command is that of this checkout. What
a container runtime adds to that, seccomp and cgroups, is not here.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.kubernetes.check import VARIABLE, Object, containers, pod_of
from tests.support.wait import until

ROOT = Path(__file__).parents[3]
HERE = (ROOT, sys.base_prefix)  # what of this machine is ours: an overlay stops at other mounts
UP = 5.0  # seconds for a process to serve, while all others of two nodes start too
LEAST = 2.0  # seconds that a kubelet gives a sidecar even where the grace is over
# As kubelets write it; nobody answers there, because hosts are in a file of their own.
RESOLV_CONF = (
    "search vwire-vl3.svc.cluster.local svc.cluster.local cluster.local\\n"
    "nameserver 10.77.0.53\\noptions ndots:5\\n"
)
ENTRYPOINT = ["nsmctl", "run"]  # the image's, which tests/unit/deploy holds to it
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Node:
    """A node: its name, address and network namespace, and what is below its `/`."""

    name: str
    address: str
    netns: str
    files: Path


@dataclass
class Container:
    """A running container; `pid` is that of its first process, as this machine has it."""

    name: str
    process: "subprocess.Popen[bytes]"
    pid: int
    log: Path
    spec: Object
    user: Sequence[str]
    environ: Mapping[str, str]

    def run(
        self, *command: str, patience: float | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in it, as `kubectl exec` and a probe do; for at most patience seconds."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--net", "--pid", "--root", "--wd"]
        return subprocess.run(
            [*enter, *self.user, *command], env=self.environ, timeout=patience,
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def probe(self, which: str) -> bool:
        """Whether the probe of that name is content, in the time a kubelet gives it."""
        probe = self.spec[which]
        try:
            done = self.run(*probe["exec"]["command"], patience=probe.get("timeoutSeconds", 1))
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    async def ready(self) -> None:
        """Wait until its own probe says that it is ready."""
        probe = next((one for one in ("startupProbe", "readinessProbe") if one in self.spec), "")
        if not probe:
            return
        try:
            await until(lambda: self.probe(probe), f"{self.name} is ready", bar=UP)
        except AssertionError as error:
            raise AssertionError(f"{error}; it says:\n{self.said()[-3000:]}") from None

    def signal(self, number: signal.Signals) -> None:
        """Send its first process a signal."""
        os.kill(self.pid, number)

    def stop(self, patience: float) -> int | None:
        """Ask it to end, as a kubelet does; its exit status, or None if it had to be killed."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()

    def kill(self) -> None:
        """End it by force, if it has not ended."""
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.process.wait()

    def said(self) -> str:
        """Its log, for people."""
        return self.log.read_text(errors="replace")


@dataclass
class Pod:
    """A pod that was started: its containers by name, the volumes they share."""

    name: str
    spec: Object
    running: dict[str, Container] = field(default_factory=dict)

    def stop(self) -> None:
        """End it in order, within its grace period; raises AssertionError if that is too short.

        A sidecar is asked when what it is beside has ended; the grace is of all together.
        """
        end = time.monotonic() + self.spec["terminationGracePeriodSeconds"]
        for name, one in reversed(self.running.items()):
            ended = one.stop(max(end - time.monotonic(), LEAST))
            assert ended is not None, f"{self.name}/{name}: {one.said()[-2000:]}"


class Cluster:
    """Objects of manifests, and pods made of them; what it starts ends with `close`."""

    def __init__(
        self,
        objects: Sequence[Object],
        files: Path,
        *,
        secrets: Mapping[str, Mapping[str, str]],
        hosts: Mapping[str, str],
    ) -> None:
        """secrets are by name, then by file; hosts are what the cluster's DNS would say."""
        self._objects = {(one["kind"], one["metadata"]["name"]): one for one in objects}
        self._files = files
        self._secrets = secrets
        self._hosts = "".join(f"{address} {name}\n" for name, address in hosts.items())
        self._pods: list[Pod] = []

    def start(
        self, kind: str, owner: str, node: Node, *, name: str, netns: str = "", address: str = ""
    ) -> Pod:
        """Start a pod of an object on a node; netns and address are its own, without host network.

        Containers start in their order: those that only prepare have ended before the next, and
        those that stay beside the others have started up.
        """
        spec = pod_of(self._objects[kind, owner])
        assert spec is not None
        own = self._files / name
        own.mkdir(exist_ok=True)
        told = {
            "metadata.name": name,
            "spec.nodeName": node.name,
            "status.hostIP": node.address,
            "status.podIP": node.address if spec.get("hostNetwork") else address,
        }
        pod = Pod(name, spec)
        self._pods.append(pod)
        volumes = {one["name"]: self._volume(one, spec, node, own) for one in spec["volumes"]}
        where = node.netns if spec.get("hostNetwork") else netns
        for one in spec.get("securityContext", {}).get("sysctls", ()):
            setting = ["sysctl", "-qw", f"{one['name']}={one['value']}"]
            subprocess.run(["ip", "netns", "exec", where, *setting], check=True)
        for each in containers(spec):
            container = self._start(each, pod, told, volumes, where, own)
            if each in spec["containers"]:
                pod.running[each["name"]] = container
            elif each.get("restartPolicy") == "Always":
                pod.running[each["name"]] = container
                asyncio.run(container.ready())
            elif code := container.process.wait(30):
                raise AssertionError(f"{name}/{each['name']} ended with {code}: {container.said()}")
        return pod

    def close(self) -> None:
        """Kill what still runs."""
        for pod in self._pods:
            for one in pod.running.values():
                one.kill()

    # --- volumes -----------------------------------------------------------------------------

    def _volume(self, one: Object, spec: Object, node: Node, own: Path) -> Path:
        """A volume's directory, its files made; with the group that the pod wants them to have."""
        if "hostPath" in one:
            path = node.files / one["hostPath"]["path"].lstrip("/")
            if one["hostPath"]["type"] == "DirectoryOrCreate":
                path.mkdir(parents=True, exist_ok=True, mode=0o755)
            assert path.is_dir(), f"{path} is not there"
            return path
        path, texts, mode = own / f"volume-{one['name']}", {}, 0o644
        match one:
            case {"emptyDir": _} | {"configMap": {"optional": True}}:  # which nobody has made
                pass
            case {"persistentVolumeClaim": {"claimName": name}}:
                path = self._files / f"disk-{name}"
            case {"configMap": {"name": name}}:
                texts = self._objects["ConfigMap", name]["data"]
            case {"secret": {"secretName": name, "defaultMode": mode}}:
                texts = self._secrets[name]
            case _:
                raise AssertionError(f"a volume nobody here knows: {one}")
        path.mkdir(exist_ok=True)
        path.chmod(0o777 if "emptyDir" in one else 0o755)
        for file, text in texts.items():
            (path / file).write_text(text)
            (path / file).chmod(mode)
        if group := spec.get("securityContext", {}).get("fsGroup"):
            for file in (path, *path.iterdir()):
                os.chown(file, -1, group)
            path.chmod(path.stat().st_mode | 0o2070)
        return path

    # --- containers --------------------------------------------------------------------------

    def _start(
        self,
        each: Object,
        pod: Pod,
        told: Mapping[str, str],
        volumes: Mapping[str, Path],
        netns: str,
        own: Path,
    ) -> Container:
        security = {**pod.spec.get("securityContext", {}), **each["securityContext"]}
        user = _user(security)
        script = self._script(each, pod.spec, security, volumes)
        process_id = [] if pod.spec.get("hostPID") else ["--pid", "--fork", "--kill-child"]
        log = own / f"{each['name']}.log"
        command = [*each.get("command", ENTRYPOINT), *each.get("args", ())]
        environ = {"PATH": PATH, **_variables(each, told)}
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["unshare", "--mount", "--propagation=private", *process_id,
                 "sh", "-euc", script, f"/run/netns/{netns}", *user, *command],
                env=environ,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        pid = process.pid if pod.spec.get("hostPID") else _child(process)
        return Container(each["name"], process, pid, log, each, user, environ)

    def _script(
        self, each: Object, spec: Object, security: Object, volumes: Mapping[str, Path]
    ) -> str:
        """What makes the container's files; it becomes `"$@"` in there, in the network of `$0`."""
        root = "/mnt/root"
        lines = [
            "mount -t tmpfs none /mnt",
            f"mkdir /mnt/up /mnt/work {root}",
            f"mount -t overlay -o lowerdir=/,upperdir=/mnt/up,workdir=/mnt/work none {root}",
            f"mount --rbind /dev {root}/dev",
            f"mount -t proc proc {root}/proc",
            # in an image everybody may reach Python; here it may be in somebody's home
            *(f"chmod a+x {root}{folder}" for folder in Path(sys.base_prefix).parents[:-1]),
            f"printf '{self._hosts}' >{root}/etc/hosts",
            f"rm -f {root}/etc/resolv.conf",  # of the overlay's: it may be a link
            f"printf '{RESOLV_CONF}' >{root}/etc/resolv.conf",
            f"mount --bind {root}/proc/sys {root}/proc/sys",
            f"mount -o remount,bind,ro {root}/proc/sys",
        ]
        for mount in each.get("volumeMounts", ()):
            source, target = volumes[mount["name"]], f"{root}{mount['mountPath']}"
            if "subPath" in mount:
                source /= mount["subPath"]
                assert source.is_file(), f"{source} is not there: a kubelet would make a folder"
                lines.append(f"touch {target}")
            else:
                lines.append(f"mkdir -p {target}")
            lines.append(f"mount --bind {source} {target}")
            if mount.get("readOnly"):
                lines.append(f"mount -o remount,bind,ro {target}")
        # past the volumes: the checkout may be where one of them is, below /tmp
        lines += [f"mkdir -p {root}{one}; mount --bind {one} {root}{one}" for one in HERE]
        if security.get("readOnlyRootFilesystem"):
            lines.append(f"mount -o remount,ro {root}")
        # at last, because whoever is in a workload's namespace with more rights than the
        # workload makes the forwarder careful
        return "\n".join([*lines, f'exec nsenter --net="$0" chroot {root} "$@"'])


def _user(security: Object) -> list[str]:
    """The command that becomes what a security context says."""
    capabilities = security["capabilities"]
    assert capabilities["drop"] == ["ALL"]
    held = ",".join(["-all", *(f"+{one.lower()}" for one in capabilities.get("add", ()))])
    group = security.get("fsGroup")
    return [
        "setpriv",
        f"--reuid={security['runAsUser']}",
        f"--regid={security['runAsGroup']}",
        f"--groups={group}" if group is not None else "--clear-groups",
        "--inh-caps=-all",
        f"--bounding-set={held}",
        *(["--no-new-privs"] if security.get("allowPrivilegeEscalation") is False else []),
    ]


def _variables(each: Object, told: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in each.get("env", ()):
        if "valueFrom" in one:
            found[one["name"]] = told[one["valueFrom"]["fieldRef"]["fieldPath"]]
        else:
            found[one["name"]] = VARIABLE.sub(lambda match: found[match[1]], one["value"])
    return found


def _child(process: "subprocess.Popen[bytes]") -> int:
    """The first process in a new PID namespace: the only child of `unshare`."""
    path = f"/proc/{process.pid}/task/{process.pid}/children"
    while process.poll() is None:
        with open(path) as file:
            if found := re.findall(r"\d+", file.read()):
                return int(found[0])
    return process.pid
