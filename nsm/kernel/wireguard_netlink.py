"""Configuring WireGuard devices of the kernel, by generic netlink.

A device is found only in the namespace it is in, so the socket has to be of that one. The
messages are pyroute2's, the socket is one of ours for the batch: its `WireGuard` class makes
an event loop for each socket, and takes four times as long (docs/decisions/0009).
"""

import base64
import errno
import struct
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from typing import Any

from nsm.errors import UnsupportedError
from nsm.kernel import netlink
from nsm.kernel.keys import Key
from nsm.kernel.netlink import Refusal, Socket
from nsm.kernel.state import endpoint, endpoint_of
from nsm.kernel.wireguard import EVERYTHING, Change, Peer, PeerChange, Settings

# linux/genetlink.h, linux/wireguard.h
_CONTROL, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 16, 3, 1, 2
_GET_DEVICE, _SET_DEVICE, _VERSION = 0, 1, 1
_REMOVE, _REPLACE_ADDRESSES, _ONLY_UPDATE = 1, 2, 4
_FAMILY = {4: 2, 6: 10}


def load() -> None:
    """Import what speaks to the kernel's WireGuard: 100 ms and 12 MB, for nodes that need it."""
    _empty()


def settings(sock: Socket, index: int) -> Settings:
    """What the device with that index holds; raises Refusal. sock is a GENERIC one."""
    question = _encoded(_family(sock), _GET_DEVICE, [("WGDEVICE_A_IFINDEX", index)])
    key: Key | None = None
    port = 0
    peers: list[Peer] = []
    for kind, body in sock.dump(question):
        said = _empty()(struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + bytes(body))
        said.decode()
        if secret := said.get_attr("WGDEVICE_A_PRIVATE_KEY"):
            key = Key(base64.b64decode(secret))
        port = said.get_attr("WGDEVICE_A_LISTEN_PORT") or port
        told = said.get_attr("WGDEVICE_A_PEERS") or ()
        peers += [_peer({slot[0]: slot[1] for slot in one["attrs"]}) for one in told]
    return Settings(key, port, tuple(peers))


def change(sock: Socket, index: int, wanted: Change) -> None:
    """Tell the device that; raises Refusal. EADDRINUSE keeps the port it had."""
    attrs: list[tuple[str, object]] = [("WGDEVICE_A_IFINDEX", index)]
    if wanted.key:
        attrs.append(("WGDEVICE_A_PRIVATE_KEY", base64.b64encode(wanted.key.secret)))
    if wanted.port:
        attrs.append(("WGDEVICE_A_LISTEN_PORT", wanted.port))
    if wanted.peers:
        attrs.append(("WGDEVICE_A_PEERS", [{"attrs": _told(one)} for one in wanted.peers]))
    (refusal,) = sock.do([_encoded(_family(sock), _SET_DEVICE, attrs)])
    if refusal:
        raise refusal


def _told(peer: PeerChange) -> list[tuple[str, object]]:
    flags = _REMOVE if peer.remove else _REPLACE_ADDRESSES if peer.new else _ONLY_UPDATE
    attrs: list[tuple[str, object]] = [
        ("WGPEER_A_PUBLIC_KEY", peer.public),
        ("WGPEER_A_FLAGS", flags),
    ]
    if peer.endpoint:
        address, port = endpoint_of(peer.endpoint)
        attrs.append(("WGPEER_A_ENDPOINT", {"addr": str(address), "port": port}))
    if peer.keepalive is not None:
        attrs.append(("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL", peer.keepalive))
    if peer.new:
        networks = [ip_network(text) for text in EVERYTHING]
        allowed = [
            {
                "attrs": [
                    ("WGALLOWEDIP_A_FAMILY", _FAMILY[network.version]),
                    ("WGALLOWEDIP_A_IPADDR", network.network_address.packed),
                    ("WGALLOWEDIP_A_CIDR_MASK", network.prefixlen),
                ]
            }
            for network in networks
        ]
        attrs.append(("WGPEER_A_ALLOWEDIPS", allowed))
    return attrs


def _peer(said: Mapping[str, Any]) -> Peer:
    at = said.get("WGPEER_A_ENDPOINT")
    allowed = {one["addr"] for one in said.get("WGPEER_A_ALLOWEDIPS") or () if "addr" in one}
    return Peer(
        said["WGPEER_A_PUBLIC_KEY"].decode(),
        endpoint(ip_address(at["addr"]), at["port"]) if at else "",
        said.get("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL", 0),
        said["WGPEER_A_LAST_HANDSHAKE_TIME"]["tv_sec"],
        allowed >= set(EVERYTHING),
    )


def _encoded(family: int, command: int, attrs: list[tuple[str, object]]) -> bytearray:
    made = _empty()()
    made["header"]["type"] = family
    made["header"]["flags"] = netlink.REQUEST
    made["cmd"], made["version"], made["attrs"] = command, _VERSION, attrs
    made.encode()
    return bytearray(made.data)


def _family(sock: Socket) -> int:
    """The number WireGuard has in this kernel's generic netlink, since its module was loaded."""
    body = struct.pack("=BBH", _GET_FAMILY, 1, 0) + netlink.text(_FAMILY_NAME, "wireguard")
    try:
        answer = sock.ask(netlink.message(_CONTROL, 0, body))
    except Refusal as refusal:
        if refusal.errno != errno.ENOENT:
            raise
        raise UnsupportedError(
            "the running kernel has no WireGuard", hint="modprobe wireguard"
        ) from refusal
    return netlink.number(netlink.table(answer, 4)[_FAMILY_ID])


def _empty() -> Any:
    from pyroute2.netlink.generic.wireguard import wgmsg

    return wgmsg
