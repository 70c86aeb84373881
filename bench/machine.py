"""What was measured on: figures of two machines are not one another's."""

import asyncio
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from nsm.kernel.node import Kernel
from nsm.kernel.tunnels import Engine

ROOT = Path(__file__).parents[1]


def facts() -> dict[str, Any]:
    """Of this machine, now."""
    return {
        "processor": _first("/proc/cpuinfo", "model name"),
        "processors": len(os.sched_getaffinity(0)),
        "memory": _first("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "python": platform.python_version(),
        "tools": {
            "ip": _said("ip", "-V"),
            "wg": _said("wg", "--version"),
            "wireguard-go": _said("wireguard-go", "--version"),
        },
        "commit": _said("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "load": os.getloadavg(),
    }


def engines() -> tuple[Engine, Engine]:
    """Whether WireGuard devices can be had here: of the kernel, and of wireguard-go."""

    async def both() -> tuple[Engine, Engine]:
        async with Kernel("bench") as kernel:
            return (
                await kernel.find_wireguard("kernel"),
                await kernel.find_wireguard("userspace"),
            )

    return asyncio.run(both())


def _first(path: str, key: str) -> str:
    with open(path) as file:
        lines = (line.partition(":") for line in file)
        return next((value.strip() for name, _, value in lines if name.strip() == key), "")


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        return "not there"
    return (done.stdout or done.stderr).partition("\n")[0].strip()
