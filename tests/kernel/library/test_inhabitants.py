"""Who keeps a namespace, shown by namespaces that are kept in each way there is."""

import contextlib
import os
import signal
import subprocess
import time

import pytest

from nsm.kernel.inhabitants import Inhabitants
from tests.support.wait import until, write


@contextlib.contextmanager
def alone():
    """A process in a namespace that nothing else keeps."""
    command = ["unshare", "--net", "sh", "-c", "echo in; exec sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"in\n"
        try:
            yield process
        finally:
            process.kill()


def inode(path):
    return os.stat(path).st_ino


async def test_a_namespace_is_kept_by_tasks_and_mounts_and_not_by_a_descriptor():
    watch = Inhabitants()
    with alone() as process, alone() as other:
        door = f"/proc/{process.pid}/ns/net"
        first, second = inode(door), inode(f"/proc/{other.pid}/ns/net")
        pin = os.open(door, os.O_RDONLY)
        try:
            seen = watch.look([first, second])
            assert (seen.kept, seen.whole) == ({first, second}, True)
            assert watch.scans == 1
            assert watch.look([first, second]).kept == {first, second}
            assert watch.scans == 1, "who was seen is looked at first"
            # a second one comes in, by the descriptor: the first may go
            enter = ["nsenter", f"--net=/proc/self/fd/{pin}", "sleep", "1000"]
            with subprocess.Popen(enter, pass_fds=[pin]) as heir:
                link = f"/proc/{heir.pid}/ns/net"
                await until(lambda: inode(link) == first, "the heir", bar=0.5, record=False)
                process.kill()
                process.wait()
                assert watch.look([first]).kept == {first}
                heir.kill()
                # until its end is waited for it is a zombie, which keeps nothing
                await until(lambda: not watch.look([first]).kept, "its end", record=False)
            assert watch.look([first, second]).kept == {second}
            assert os.fstat(pin).st_ino == first, "the namespace is there all the same"
        finally:
            os.close(pin)


async def test_a_namespace_with_a_name_is_kept_also_where_only_another_mount_namespace_has_it():
    watch, name = Inhabitants(), f"t{os.getpid()}-kept"
    subprocess.run(["ip", "netns", "add", name], check=True)
    path = f"/run/netns/{name}"
    here = inode(path)
    mounts = f"mount -t tmpfs none /mnt; touch /mnt/x; mount --bind {path} /mnt/x; echo in"
    hold = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", f"{mounts}; sleep 99"]
    try:
        assert watch.look([here]).kept == {here}
        with subprocess.Popen(hold, stdout=subprocess.PIPE, start_new_session=True) as holder:
            try:
                assert holder.stdout.readline() == b"in\n"
                subprocess.run(["ip", "netns", "del", name], check=True)
                assert watch.look([here]).kept == {here}
            finally:
                os.killpg(holder.pid, signal.SIGKILL)
        await until(lambda: not watch.look([here]).kept, "its end", bar=0.5, record=False)
    finally:
        if os.path.exists(path):
            subprocess.run(["ip", "netns", "del", name], check=True)


def process(proc, pid, *, net="net:[1]", root="/", mounts=""):
    """One in a /proc of files; all are in one mount namespace."""
    folder, task = proc / pid, proc / pid / "task" / pid / "ns"
    task.mkdir(parents=True)
    (folder / "ns").mkdir()
    (folder / "ns" / "mnt").symlink_to("mnt:[1]")
    (folder / "root").symlink_to(root)
    (task / "net").symlink_to(net)
    (folder / "mountinfo").write_text(mounts)
    return task / "net", folder / "mountinfo"


MOUNTED = "9 1 0:4 net:[6] /run/netns/a rw - nsfs nsfs rw\n"


def test_who_is_hidden_without_a_word_leaves_a_look_in_doubt(tmp_path):
    process(tmp_path, "7")
    assert not Inhabitants(str(tmp_path)).look([5]).whole, "hidepid leaves out the first process"
    process(tmp_path, "1")
    assert Inhabitants(str(tmp_path)).look([5]).whole


def test_our_own_threads_keep_no_namespace(tmp_path):
    for pid in ("1", "7"):
        process(tmp_path, pid, net=f"net:[{pid}]", mounts=MOUNTED)
    (tmp_path / "self").symlink_to("7")
    seen = Inhabitants(str(tmp_path)).look([6, 7])
    assert (seen.kept, seen.whole) == ({6}, True)


def test_a_namespace_that_is_mounted_outside_of_somebody_s_chroot_is_kept(tmp_path):
    process(tmp_path, "1", root="/var/empty")
    process(tmp_path, "7", mounts=MOUNTED)
    process(tmp_path, "8", root="/var/empty")
    assert Inhabitants(str(tmp_path)).look([6]).kept == {6}


def test_a_process_whose_first_thread_ended_keeps_its_namespace(tmp_path):
    process(tmp_path, "1")
    process(tmp_path, "7")[0].unlink()
    (tmp_path / "7" / "ns" / "mnt").unlink()
    other = tmp_path / "7" / "task" / "8" / "ns"
    other.mkdir(parents=True)
    (other / "net").symlink_to("net:[5]")
    assert Inhabitants(str(tmp_path)).look([5]).kept == {5}


@pytest.mark.parametrize("hidden", ["task", "mountinfo"])
def test_what_may_not_be_seen_is_said(tmp_path, hidden):
    """A /proc of files, because root is refused nowhere."""
    process(tmp_path, "1", root="/var/empty")
    task, mountinfo = process(tmp_path, "7", net="net:[5]", mounts=MOUNTED)
    seen = Inhabitants(str(tmp_path)).look([5, 6, 7])
    assert (seen.kept, seen.whole) == ({5, 6}, True)
    if hidden == "task":
        task.unlink()
        task.mkdir()
        refused = task
    else:
        mountinfo.unlink()
        refused = mountinfo
        refused.symlink_to(refused)  # ELOOP stands for whatever is no end of a process
    real = os.readlink

    def readlink(path):
        if path == str(refused):
            raise PermissionError(13, "refused")
        return real(path)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("nsm.kernel.inhabitants.os.readlink", readlink)
        assert not Inhabitants(str(tmp_path)).look([5, 6, 7]).whole


def test_a_look_at_five_hundred_namespaces_costs_a_few_milliseconds():
    """What a forwarder spends each second where it has five hundred wires' ends."""
    with contextlib.ExitStack() as stack:
        inodes = [inode(f"/proc/{stack.enter_context(alone()).pid}/ns/net") for _ in range(20)]
        watch = Inhabitants()
        began = time.perf_counter()
        assert len(watch.look(inodes).kept) == 20
        scan = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(25):
            assert len(watch.look(inodes).kept) == 20
        looks = time.perf_counter() - began
    tasks = sum(len(os.listdir(f"/proc/{p}/task")) for p in os.listdir("/proc") if p.isdigit()
                and os.path.exists(f"/proc/{p}/task"))  # fmt: skip
    print(f"scan of {tasks} tasks {scan * 1000:.2f} ms; 500 known {looks * 1000:.2f} ms")
    write("a scan of all of /proc", scan, 0.1)
    write("a look at 500 namespaces", looks, 0.05)
