"""Who is at the other end of a socket, and whose a file is: what the kernel says, believed."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nsm.errors import DeniedError, PreconditionError
from nsm.identity.attest import SO_PEERPIDFD, Connected, attest, connected
from nsm.identity.authority import open_authority


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs until it is ended."""
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        yield running
        running.kill()


def test_the_kernel_says_who_connected(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as caller:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        caller.connect(str(tmp_path / "s"))
        accepted, _ = listener.accept()
        with accepted:
            who = connected(accepted)
    try:
        assert (who.pid, who.uid, who.gid) == (os.getpid(), os.getuid(), os.getgid())
        seen = attest(who, digest=False)
        namespace = os.stat("/proc/self/ns/net")
        assert seen.netns == (namespace.st_dev, namespace.st_ino)
        assert seen.program == os.path.realpath(sys.executable)
        assert seen.cgroups
        paths = {
            line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()
        }
        assert set(seen.cgroups) == paths
    finally:
        os.close(who.pidfd)


def test_a_number_that_went_to_another_process_is_found_out(
    process: subprocess.Popen[bytes],
) -> None:
    with subprocess.Popen(["true"]) as ended:
        handle = os.pidfd_open(ended.pid)
    try:
        with pytest.raises(DeniedError, match="has ended"):
            attest(Connected(process.pid, 0, 0, handle), digest=False)
    finally:
        os.close(handle)


def test_without_a_handle_nothing_is_believed(process: subprocess.Popen[bytes]) -> None:
    with pytest.raises(DeniedError, match="has ended"):
        attest(Connected(process.pid, 0, 0, -1), digest=False)


def test_without_a_handle_only_an_old_kernel_is_asked_by_number() -> None:
    class Asked(socket.socket):
        """A socket whose kernel answers the question for the handle with `why`."""

        why = errno.ENOPROTOOPT

        def getsockopt(self, level: int, option: int, room: int = 0) -> Any:
            if option == SO_PEERPIDFD:
                raise OSError(self.why, os.strerror(self.why))
            return super().getsockopt(level, option, room)

    ours, theirs = socket.socketpair()
    with theirs, Asked(fileno=ours.detach()) as asked:
        old = connected(asked)
        assert old.pidfd >= 0
        os.close(old.pidfd)
        for why in (errno.EINVAL, errno.ESRCH, errno.EMFILE):  # it ended, or we are short of room
            asked.why = why
            assert connected(asked).pidfd == -1


def test_a_process_that_became_another_users_is_refused(process: subprocess.Popen[bytes]) -> None:
    handle = os.pidfd_open(process.pid)
    try:
        with pytest.raises(DeniedError, match="as user 4321 and is another's"):
            attest(Connected(process.pid, 4321, 0, handle), digest=False)
    finally:
        os.close(handle)


@pytest.mark.parametrize("which", ["", "authority.pem"])
def test_an_authority_in_another_users_hands_is_refused(tmp_path: Path, which: str) -> None:
    open_authority(tmp_path / "issuer", "td.example")
    os.chown(tmp_path / "issuer" / which, 4321, 4321)
    with pytest.raises(PreconditionError, match="belongs to user 4321, and the issuer runs as 0"):
        open_authority(tmp_path / "issuer", "td.example")


def test_a_process_that_cannot_be_seen_is_refused() -> None:
    with pytest.raises(DeniedError, match="process namespace"):
        attest(Connected(0, 0, 0, -1), digest=False)


def test_a_program_that_was_replaced_is_digested_as_it_runs(tmp_path: Path) -> None:
    program = tmp_path / "compiled"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(0o755)
    with subprocess.Popen([str(program), "60"]) as running:
        handle = os.pidfd_open(running.pid)
        try:
            who = Connected(running.pid, os.getuid(), os.getgid(), handle)
            while attest(who, digest=False).program != str(program):
                pass  # between fork and exec it is still this program
            first = attest(who, digest=True)
            program.unlink()
            program.write_bytes(b"another")
            again = attest(who, digest=True)
        finally:
            running.kill()
            os.close(handle)
    assert first.digest == again.digest
    assert first.digest
