"""What the running kernel can do of what some cannot, found by trying.

Each is tried in a network namespace that goes with the process that tries.
"""

import functools
import subprocess

TRIALS = {
    "wireguard": "ip link add name try0 type wireguard",
    "netem": "tc qdisc add dev lo root netem delay 1ms",
    "vrf": "ip link add name try0 type vrf table 10",
    "vlan": """
        ip link add name try0 type veth peer name try1
        ip link add link try0 name try2 type vlan id 5
    """,
    # a module that is loaded as it comes makes a dummy0, and in the host's own namespace
    "dummy": """
        modprobe -q dummy numdummies=0 || :
        ip link add name try0 type dummy
    """,
    # what some kernels have not yet, and have to be served without
    "before-6.18": 'printf "%s\n6.18\n" "$(uname -r)" | sort -VC',
}


@functools.cache
def lacks(feature: str) -> str:
    """Why this kernel cannot do one of TRIALS; '' where it can."""
    trial = ["unshare", "--net", "sh", "-ec", TRIALS[feature]]
    done = subprocess.run(trial, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"
