"""What kind of traffic an Ethernet frame is: just enough to say what passes a cable. Pure."""

import struct
from collections.abc import Iterator, Sequence
from typing import Final

_IPV4, _IPV6 = 0x0800, 0x86DD
_TCP, _UDP = 6, 17
_ICMP: Final = {1, 58}
_FRAGMENT6 = 44
_VXLAN_PORTS: Final = {4789}
_HANDSHAKES: Final = {(1, 148), (2, 92), (3, 64)}  # WireGuard's: initiation, response, cookie
_DATA: Final = 4
_EMPTY: Final = 32  # bytes of WireGuard data that carry no packet: a keepalive
_ECHOES: Final = {0, 8, 128, 129}  # of ICMP and ICMPv6; neighbour discovery is no traffic


def checksum(data: bytes) -> int:
    """The Internet checksum."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1]))
    if len(data) & 1:
        total += data[-1] << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def kinds(frame: bytes, marks: Sequence[bytes] = ()) -> frozenset[str]:
    """The kinds of a frame, those of a frame inside a VXLAN as `inner-...`.

    marks: bytes of a transfer; a frame that shows one of them in clear is `payload`, and
    `bare-payload` if that is in no tunnel either.
    """
    found = set(_outer(frame))
    if any(mark in frame for mark in marks):
        found.add("payload")
        if "vxlan" not in found:
            found.add("bare-payload")
    return frozenset(found)


def _outer(frame: bytes) -> Iterator[str]:
    packet = _packet(frame)
    if packet is None:
        return
    protocol, body, is_fragment = packet
    if is_fragment:
        yield "fragments"
    if protocol in _ICMP and body[:1] and body[0] in _ECHOES:
        yield "icmp"
    elif protocol == _TCP:
        yield "tcp"
        # a TLS record: handshake or application data, version 3.x
        offset = (body[12] >> 4) * 4 if len(body) > 12 else 0
        if body[offset : offset + 2] in (b"\x16\x03", b"\x17\x03"):
            yield "tls"
    elif protocol == _UDP and len(body) >= 16 and _port(body) in _VXLAN_PORTS:
        yield "vxlan"
        yield from (f"inner-{kind}" for kind in _outer(body[16:]) if kind in ("icmp", "tcp"))
    elif protocol == _UDP:
        yield from _wireguard(body[8:])


def _wireguard(data: bytes) -> Iterator[str]:
    """WireGuard by its shape, whatever the port: each of its tunnels has another."""
    if len(data) < _EMPTY or data[1:4] != bytes(3):
        return
    if (data[0], len(data)) in _HANDSHAKES:
        yield from ("wireguard", "wireguard-handshake")
    elif data[0] == _DATA:
        yield "wireguard"
        if len(data) > _EMPTY:
            yield "wireguard-data"


def _port(datagram: bytes) -> int:
    """The destination port of a UDP datagram."""
    return int.from_bytes(datagram[2:4], "big")


def _packet(frame: bytes) -> tuple[int, bytes, bool] | None:
    """Protocol, its data, and whether it is a fragment; None for what is no IP packet."""
    if len(frame) < 34:
        return None
    (kind,) = struct.unpack_from("!H", frame, 12)
    data = frame[14:]
    if kind == _IPV4:
        more = struct.unpack_from("!H", data, 6)[0] & 0x3FFF
        return data[9], data[(data[0] & 15) * 4 :], more != 0
    if kind == _IPV6 and len(data) >= 40:
        if data[6] == _FRAGMENT6:
            return data[40] if len(data) > 40 else 0, data[48:], True
        return data[6], data[40:], False
    return None
