"""A caller's own network namespace, named by path instead of by descriptor.

Stock gRPC libraries cannot send descriptors. Their user may say
`file:///proc/<pid>/ns/net`, which is taken only where the kernel itself
(SO_PEERCRED) says that the process at the other end of the socket is <pid>, and
that this process still runs after its namespace was opened: a number is given
to somebody else when its process has ended.
"""

import os
import re

from nsm.caller import Caller, Credentials, ended
from nsm.descriptors import opened
from nsm.errors import DeniedError, InvalidError, PreconditionError

_PATH = re.compile(r"file:///proc/(?P<pid>self|thread-self|[0-9]{1,10})/ns/net", re.ASCII)


async def open_of_caller(url: str, caller: Caller) -> int:
    """The namespace url names, as a descriptor the caller of this function owns."""
    found = _PATH.fullmatch(url)
    if found is None:
        raise InvalidError(
            f"{url[:100]!r} names no network namespace",
            hint="send its descriptor and say inode://<dev>/<ino>, or say"
            " file:///proc/<your pid>/ns/net",
        )
    process = caller.process
    named = found["pid"]
    if process is None or (named.isdecimal() and int(named) != process.pid):
        owner = f"process {process.pid}" if process else "no process of this node"
        raise DeniedError(
            f"{url} was named by {caller.id}, which is {owner}",
            hint="name your own namespace, or send a descriptor of the other one",
        )
    return await opened(_open, process, str(caller.id))


def _open(process: Credentials, whose: str) -> int:
    try:
        fd = os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as refusal:
        raise PreconditionError(
            f"the network namespace of process {process.pid}, {whose}: {refusal.strerror}",
            hint="is it still alive, and in the manager's /proc? If another user runs it, the"
            " manager needs CAP_SYS_PTRACE",
        ) from refusal
    if ended(process):
        os.close(fd)
        raise DeniedError(
            f"process {process.pid}, {whose}, ended while its network namespace was looked for,"
            " and its number may be another's by now",
            hint="ask from a process that lives until it is answered",
        )
    return fd
