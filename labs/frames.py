"""What kind of traffic an Ethernet frame is: just enough to say what passes a cable. Pure."""

import struct
from collections.abc import Iterator, Sequence
from typing import Final

_IPV4, _IPV6 = 0x0800, 0x86DD
_TCP, _UDP = 6, 17
_ICMP: Final = {1, 58}
_FRAGMENT6 = 44
_OPTIONS6: Final = {0, 43, 60}  # headers before a packet's own; kernels tell of groups behind one
_IGMP = 2
_VXLAN_PORTS: Final = {4789}
_DNS_PORTS: Final = {53}
_HTTP: Final = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS ", b"HTTP/1.")
_HANDSHAKES: Final = {(1, 148), (2, 92), (3, 64)}  # WireGuard's: initiation, response, cookie
_DATA: Final = 4
_RECORDS: Final = {20, 21, 22, 23}  # TLS's: change of cipher, alert, handshake, data
_EMPTY: Final = 32  # bytes of WireGuard data that carry no packet: a keepalive
_ECHOES: Final = {0, 8, 128, 129}  # of ICMP and ICMPv6; neighbour discovery is no traffic
_BARE: Final = 8  # bytes of an echo that carries nothing: forwarders and clients ask who lives


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


class Reader:
    """The kinds of frames that are told in their order: also of what is inside a TLS record that

    began in another frame, and `other` for data of none of the kinds.
    """

    def __init__(self, marks: Sequence[bytes] = ()) -> None:
        self._marks = marks
        self._flows: dict[bytes, _Records] = {}

    def kinds(self, frame: bytes) -> frozenset[str]:
        """The kinds of the next frame."""
        found = set(kinds(frame, self._marks))
        packet = _packet(frame)
        if packet is None:
            return frozenset(found)
        protocol, body, _ = packet
        data = True
        if protocol == _TCP:
            data = len(body) >= 20 and len(body) > (body[12] >> 4) * 4
            if data and self._flow(frame, body).are_next(body):
                found.add("tls")
        if data and protocol not in (*_ICMP, _IGMP) and found <= {"tcp", "fragments"}:
            found.add("other")
        return frozenset(found)

    def _flow(self, frame: bytes, body: bytes) -> "_Records":
        addresses = frame[26:34] if frame[12:14] == b"\x08\x00" else frame[22:54]
        return self._flows.setdefault(addresses + body[:4], _Records())


class _Records:
    """TLS records in one direction of a TCP connection."""

    def __init__(self) -> None:
        self._next: int | None = None  # number of the byte to come
        self._left = 0  # bytes of the record that are to come
        self._head = b""  # of a header that is not whole yet

    def are_next(self, segment: bytes) -> bool:
        """Whether a segment's data are records, or parts of them."""
        number = int.from_bytes(segment[4:8], "big")
        data = segment[(segment[12] >> 4) * 4 :]
        end = number + len(data) & 0xFFFFFFFF
        known = 0 if self._next is None else self._next - number & 0xFFFFFFFF
        if self._next is None or known > 1 << 31:  # what was in between nobody saw
            self._left, self._head, known = 0, b"", 0
        data = data[known:]
        if not data:
            return True  # all of it once more
        self._next = end
        while data:
            if self._left:
                taken = min(self._left, len(data))
                self._left, data = self._left - taken, data[taken:]
                continue
            room = 5 - len(self._head)
            self._head, data = self._head + data[:room], data[room:]
            if self._head[0] not in _RECORDS or self._head[1:2] not in (b"", b"\x03"):
                self._next = None
                return False
            if len(self._head) == 5:
                self._left, self._head = int.from_bytes(self._head[3:], "big"), b""
        return True


def _outer(frame: bytes) -> Iterator[str]:
    packet = _packet(frame)
    if packet is None:
        return
    protocol, body, is_fragment = packet
    if is_fragment:
        yield "fragments"
    if protocol in _ICMP and len(body) > _BARE and body[0] in _ECHOES:
        yield "icmp"
    elif protocol == _TCP:
        yield "tcp"
        # a TLS record: handshake or application data, version 3.x
        offset = (body[12] >> 4) * 4 if len(body) > 12 else 0
        if body[offset : offset + 2] in (b"\x16\x03", b"\x17\x03"):
            yield "tls"
        if body.startswith(_HTTP, offset):
            yield "http"
    elif protocol == _UDP and len(body) >= 16 and _port(body) in _VXLAN_PORTS:
        yield "vxlan"
        yield from (f"inner-{kind}" for kind in _outer(body[16:]) if kind in ("icmp", "tcp"))
    elif protocol == _UDP and len(body) >= 20 and _ports(body) & _DNS_PORTS:
        yield "dns"
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


def _ports(datagram: bytes) -> set[int]:
    """Both ports of a UDP datagram."""
    return {*struct.unpack_from("!2H", datagram)}


def _packet(frame: bytes) -> tuple[int, bytes, bool] | None:
    """Protocol, its data, and whether it is a fragment; None for what is no IP packet."""
    if len(frame) < 34:
        return None
    (kind,) = struct.unpack_from("!H", frame, 12)
    data = frame[14:]
    if kind == _IPV4:
        length, more = struct.unpack_from("!H2xH", data, 2)
        # behind it there may be what fills a short frame; 0 where the kernel cuts it only later
        return data[9], data[(data[0] & 15) * 4 : length or None], more & 0x3FFF != 0
    if kind == _IPV6 and len(data) >= 40:
        protocol, body = data[6], data[40:]
        while protocol in _OPTIONS6 and len(body) >= 8:
            protocol, body = body[0], body[(body[1] + 1) * 8 :]
        if protocol == _FRAGMENT6:
            return body[0] if body else 0, body[8:], True
        return protocol, body, False
    return None
