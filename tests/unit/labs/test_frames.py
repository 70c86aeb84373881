"""What kind of traffic a frame is: built by scapy, named by us."""

import pytest
from scapy.contrib.wireguard import (
    Wireguard,
    WireguardCookieReply,
    WireguardInitiation,
    WireguardResponse,
    WireguardTransport,
)
from scapy.layers.dns import DNS
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6MLReport2,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import ARP, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Padding

from labs import frames

ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")  # else scapy would ask for them
OUTER = ETHER / IP(src="198.18.0.1", dst="198.18.0.2")
OUTER6 = ETHER / IPv6(src="fd00:18::1", dst="fd00:18::2")
INNER = ETHER / IP(src="172.16.1.1", dst="172.16.1.0")
SEALED = UDP(sport=51977, dport=52011) / Wireguard()
GROUPS = ETHER / IP(src="198.18.0.1", dst="224.0.0.22", proto=2) / bytes(8)
IPIP = OUTER / IP(src="10.0.0.1", dst="10.0.0.2") / ICMP()
TUNNEL = UDP(sport=40000, dport=4789) / VXLAN(vni=77)


@pytest.mark.parametrize(
    ("frame", "kinds"),
    [
        pytest.param(OUTER / ICMP() / b"x", {"icmp"}, id="an echo"),
        pytest.param(OUTER6 / ICMPv6EchoRequest(data=b"x"), {"icmp"}, id="an IPv6 echo"),
        pytest.param(OUTER / ICMP(), set(), id="whether a node lives"),
        pytest.param(OUTER / ICMP() / Padding(bytes(18)), set(), id="the same, in a full frame"),
        pytest.param(OUTER6 / ICMPv6EchoRequest(), set(), id="the same, over IPv6"),
        pytest.param(OUTER6 / ICMPv6ND_NS(), set(), id="neighbour discovery is no traffic"),
        pytest.param(Ether() / ARP(), set(), id="nor is ARP"),
        pytest.param(OUTER / TCP() / b"x", {"tcp"}, id="TCP"),
        pytest.param(OUTER / TCP() / b"\x17\x03\x03\x00\x10x", {"tcp", "tls"}, id="TLS"),
        pytest.param(OUTER / TUNNEL / INNER / ICMP() / b"x", {"vxlan", "inner-icmp"}, id="VXLAN"),
        pytest.param(OUTER6 / TUNNEL / INNER / TCP(), {"vxlan", "inner-tcp"}, id="over IPv6"),
        pytest.param(OUTER / UDP(sport=1000, dport=54) / (b"q" * 20), set(), id="some UDP"),
        pytest.param(OUTER / UDP(dport=53) / DNS(), {"dns"}, id="a question"),
        pytest.param(OUTER6 / UDP(sport=53) / DNS(), {"dns"}, id="an answer"),
        pytest.param(OUTER / TCP() / b"GET / HTTP/1.1", {"tcp", "http"}, id="HTTP"),
        pytest.param(OUTER / TCP() / b"HTTP/1.1 200 OK", {"tcp", "http"}, id="HTTP's answer"),
        pytest.param(
            OUTER / SEALED / WireguardInitiation(),
            {"wireguard", "wireguard-handshake"},
            id="WireGuard's initiation",
        ),
        pytest.param(
            OUTER6 / SEALED / WireguardResponse(),
            {"wireguard", "wireguard-handshake"},
            id="its response",
        ),
        pytest.param(
            OUTER / SEALED / WireguardCookieReply(),
            {"wireguard", "wireguard-handshake"},
            id="its cookie",
        ),
        pytest.param(
            OUTER / SEALED / WireguardTransport(encrypted_encapsulated_packet=bytes(16)),
            {"wireguard"},
            id="its keepalive",
        ),
        pytest.param(
            OUTER6 / SEALED / WireguardTransport(encrypted_encapsulated_packet=bytes(96)),
            {"wireguard", "wireguard-data"},
            id="its data",
        ),
        pytest.param(
            OUTER / UDP(sport=1000, dport=51820) / b"\4\0\1\0" / bytes(60),
            set(),
            id="nearly WireGuard",
        ),
        pytest.param(
            fragment(OUTER / ICMP() / bytes(3000), 1000)[1], {"fragments"}, id="a fragment"
        ),
        pytest.param(
            OUTER6 / IPv6ExtHdrFragment(offset=10) / b"xxxx", {"fragments"}, id="an IPv6 fragment"
        ),
    ],
)
def test_a_frame_is_named_by_what_it_carries(frame, kinds):
    assert frames.kinds(bytes(frame)) - {"fragments"} == kinds - {"fragments"} or (
        kinds == {"fragments"}
    )
    assert ("fragments" in frames.kinds(bytes(frame))) == ("fragments" in kinds)


def test_bytes_of_a_transfer_are_found_in_clear_wherever_they_are():
    frame = OUTER / TUNNEL / INNER / TCP() / b"..the mark.."
    found = frames.kinds(bytes(frame), [b"the mark"])
    assert ("payload" in found, "bare-payload" in found) == (True, False)
    assert "payload" not in frames.kinds(bytes(frame), [b"another"])
    found = frames.kinds(bytes(INNER / TCP() / b"..the mark.."), [b"the mark"])
    assert ("payload" in found, "bare-payload" in found) == (True, True)


@pytest.mark.parametrize("size", range(0, 120, 7))
def test_no_length_of_garbage_is_an_error(size):
    whole = bytes(OUTER / TUNNEL / INNER / TCP() / bytes(40))
    frames.kinds(whole[:size])


def test_the_checksum_is_the_internets():
    packet = bytearray(bytes(IP(src="1.2.3.4", dst="5.6.7.8")))
    expected = bytes(packet[10:12])
    packet[10:12] = b"\0\0"
    assert frames.checksum(bytes(packet)).to_bytes(2, "big") == expected


# -- frames in their order ------------------------------------------------------------------------

RECORD = b"\x17\x03\x03\x0f\xa0" + b"x" * 4000


def told(reader: frames.Reader, outer: Packet, data: bytes, number: int) -> frozenset[str]:
    return reader.kinds(bytes(outer / TCP(sport=40000, dport=5002, seq=number) / data))


@pytest.mark.parametrize("outer", [OUTER, OUTER6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("cut", [1, 3, 5, 1000, 4004, 4006])
def test_what_is_in_a_record_is_tls_wherever_it_is_cut(outer, cut):
    reader, stream = frames.Reader(), RECORD * 3
    first = 0xFFFFFFFF - 2000  # so that the numbers begin anew in the midst
    for at in range(0, len(stream), cut):
        part = stream[at : at + cut]
        assert "tls" in told(reader, outer, part, first + at & 0xFFFFFFFF), at
        if at and cut > 900:  # what is sent once more counts as what it was
            assert "tls" in told(reader, outer, part, first + at & 0xFFFFFFFF), at
        if cut < 1000 and at > 50:
            break


def test_what_is_no_record_or_follows_what_nobody_saw_is_other():
    reader = frames.Reader()
    assert told(reader, OUTER, b"\x05ssh", 0) == {"tcp", "other"}
    assert told(reader, OUTER, RECORD[:1000], 4) == {"tcp", "tls"}
    assert told(reader, OUTER, RECORD[1400:2000], 1404) == {"tcp", "other"}
    assert told(reader, OUTER, RECORD, 2004) == {"tcp", "tls"}
    assert told(reader, OUTER, b"plain", 2004 + len(RECORD)) == {"tcp", "other"}
    assert told(frames.Reader(), OUTER, RECORD[9:99], 0) == {"tcp", "other"}


@pytest.mark.parametrize(
    ("frame", "kinds"),
    [
        pytest.param(OUTER / TCP(), {"tcp"}, id="no data"),
        pytest.param(OUTER / TCP() / b"GET /", {"tcp", "http"}, id="of a kind"),
        pytest.param(OUTER / UDP(sport=1000, dport=54) / b"q", {"other"}, id="UDP"),
        pytest.param(OUTER6 / UDP(sport=1000, dport=54) / b"q", {"other"}, id="UDP over IPv6"),
        pytest.param(IPIP, {"other"}, id="another protocol"),
        pytest.param(OUTER / TUNNEL / INNER / UDP(), {"vxlan"}, id="a tunnel"),
        pytest.param(OUTER6 / ICMPv6ND_NS(), set(), id="neighbour discovery"),
        pytest.param(
            OUTER6 / IPv6ExtHdrHopByHop() / ICMPv6MLReport2(), set(), id="a kernel's groups"
        ),
        pytest.param(OUTER6 / IPv6ExtHdrHopByHop() / TCP() / b"x", {"tcp", "other"}, id="options"),
        pytest.param(GROUPS, set(), id="groups of IPv4"),
        pytest.param(Ether() / ARP(), set(), id="ARP"),
    ],
)
def test_data_of_none_of_the_kinds_is_other(frame, kinds):
    assert frames.Reader().kinds(bytes(frame)) == kinds


def test_what_fills_a_short_frame_is_no_data():
    assert frames.Reader().kinds(bytes(OUTER / TCP()) + bytes(6)) == {"tcp"}
