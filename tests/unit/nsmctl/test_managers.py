"""Which devices other managers of links choose, read as they read it."""

import pytest

from nsmctl.machine import managers
from nsmctl.machine.managers import Ours

VETH, VXLAN = Ours("nsm-1", "veth"), Ours("nsm0123456789ab", "vxlan")


@pytest.mark.parametrize(
    ("match", "taken"),
    [
        ("Name=nsm*", True),
        ("Name=eth* nsm-?", True),
        ("Name=eth*\nName=nsm*", True),
        ("Name=en* eth*", False),
        ("Name=!nsm*", False),
        ("Name=!eth0", True),
        ("Type=ether", True),
        ("Kind=veth bridge", True),
        ("Kind=bridge", False),
        ("Type=ether\nKind=!veth vxlan", False),
        ("MACAddress=02:00:00:00:00:01", False),
        ("Driver=virtio_net\nName=*", False),
        ("Driver=veth vxlan", True),
        ("Driver=!veth", False),
        ("Host=somebody\nName=*", True),
        ("Host=somebody", False),  # then it says nothing of devices, and is not used
        ("Name=", False),
        ("", False),
    ],
)
def test_a_match_of_systemd(tmp_path, match, taken):
    file = tmp_path / "x.network"
    file.write_text(f"# mine\n[Match]\n{match}\n[Network]\nDHCP=yes\n")
    section = managers._read(str(file)).get("Match", ())
    assert managers._is_matched(VETH, section, "Name") is taken


@pytest.mark.parametrize(
    ("said", "leaves"),
    [
        (["interface-name:nsm*", "type:bridge"], True),
        (["*"], True),
        (["*", "except:type:vxlan"], False),
        (["interface-name:=nsm-1"], False),  # and not the tunnels
        (["type:veth", "type:vxlan"], True),
        (["mac:02:00:00:00:00:01"], False),
        ([], False),
    ],
)
def test_a_list_of_networkmanager(said, leaves):
    assert all(managers._matches(ours, said) for ours in (VETH, VXLAN)) is leaves


def test_what_wireguard_go_makes_is_ours_too(tmp_path):
    file = tmp_path / "x.network"
    file.write_text("[Match]\nType=none\n")
    section = managers._read(str(file))["Match"]
    chosen = [ours for ours in managers.OURS if managers._is_matched(ours, section, "Name")]
    assert [ours.kind for ours in chosen] == ["tun"]


@pytest.mark.parametrize(
    ("sections", "managed"),
    [
        ({"device-x": [("match-device", "interface-name:nsm*"), ("managed", "0")]}, False),
        ({"device-x": [("managed", "false")]}, False),
        ({"device-x": [("match-device", "interface-name:eth*"), ("managed", "0")]}, True),
        ({"device": [("match-device", "*"), ("wifi.backend", "iwd")]}, True),
        ({}, True),
    ],
)
def test_a_device_section_of_networkmanager(sections, managed):
    assert managers._is_managed(VETH, [{}, sections, {}]) is managed
