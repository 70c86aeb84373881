"""A program that does nothing but be there: says it is ready, ends when it is asked to.

Its log holds one JSON line of what it finds itself to be, for comparing one that was
forked with one that was exec'd.
"""

import asyncio
import json
import os
import signal
import sys
import threading


def facts() -> dict[str, object]:
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        fds[name] = target.split("[")[0].split(":")[0] if ":" in target else target
    with open("/proc/self/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    return {
        "argv": sys.argv,
        "main": sys.modules["__main__"].__name__,
        "spec": sys.modules["__main__"].__spec__.name,  # type: ignore[union-attr]
        "safe_path": sys.flags.safe_path,
        "environment": dict(os.environ),
        "fds": fds,
        "signals": {s.name: repr(signal.getsignal(s)).split(" at ")[0] for s in signal.Signals},
        "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
        "ids": [os.getresuid(), os.getresgid(), os.getgroups()],
        "session": os.getsid(0) == os.getpid() == os.getpgid(0),
        "umask": status["Umask"],
        "capabilities": {k: v for k, v in status.items() if k.startswith("Cap")},
        "threads": [thread.name for thread in threading.enumerate()],
        "cwd": os.getcwd(),
        "stdout": [sys.stdout.line_buffering, sys.stderr.line_buffering, sys.stdout.encoding],
        "netns": os.readlink("/proc/self/ns/net"),
        "dumpable": os.stat("/proc/self").st_gid,
    }


async def stay() -> None:
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    if fd := int(os.environ.get("NSM_READY_FD", "0")):
        os.write(fd, b"standing in\n")
        os.close(fd)
    await asked.wait()


def main() -> int:
    print(json.dumps(facts()), flush=True)
    if "FAIL" in os.environ.get("NSM_CONNECT_TO", ""):
        print("told to fail", file=sys.stderr)
        return 1
    asyncio.run(stay())
    print(json.dumps({"ended": True}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
