"""Every field of every message that has a value survives decoding and encoding."""

import pytest
from google.protobuf.descriptor import FieldDescriptor

from nsm.proto import connection_pb2, networkservice_pb2, registry_pb2
from nsm.rpc import wire

MESSAGES = [
    connection_pb2.Connection,
    connection_pb2.ConnectionEvent,
    connection_pb2.MonitorScopeSelector,
    networkservice_pb2.NetworkServiceRequest,
    registry_pb2.NetworkService,
    registry_pb2.NetworkServiceEndpoint,
]
NEWER = b"\xc2\x3e\x05newer"  # field 1000, length-delimited: nobody here knows it
NO_VALUE_OF_ITS_OWN = {
    "google.protobuf.Timestamp",
    "connectioncontext.IpFamily",
    "registry.NetworkServiceLabels",
}


def full(kind, depth=0):
    """A message with every field set to something that is not its default."""
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        fill(message, field, depth)
    return message


def fill(message, field, depth):
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        value = entry.fields_by_name["value"]
        if value.message_type is None:
            getattr(message, field.name)["key"] = "value"
        else:
            getattr(message, field.name)["key"].CopyFrom(full(value.message_type._concrete_class))
    elif field.is_repeated:
        values = getattr(message, field.name)
        if entry is None:
            values.extend(["one", "two"])
        else:
            values.add().CopyFrom(full(entry._concrete_class, depth + 1))
    elif entry is not None:
        getattr(message, field.name).CopyFrom(full(entry._concrete_class, depth + 1))
    else:
        setattr(message, field.name, scalar(field))


def scalar(field):
    if field.type == FieldDescriptor.TYPE_STRING:
        return f"a {field.name}"
    if field.type == FieldDescriptor.TYPE_BOOL:
        return True
    if field.type == FieldDescriptor.TYPE_ENUM:
        return 1
    return 7


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.DESCRIPTOR.full_name)
def test_decoding_and_encoding_is_identity_for_every_field(kind):
    message = full(kind)
    assert wire.to_pb(wire.from_pb(message)) == message


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.DESCRIPTOR.full_name)
def test_an_empty_message_stays_empty(kind):
    assert wire.to_pb(wire.from_pb(kind())).SerializeToString() in (b"", b"\n\0")


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.DESCRIPTOR.full_name)
def test_fields_of_a_newer_peer_pass_through_at_every_level(kind):
    message = full(kind)
    graft(message)
    passed = wire.to_pb(wire.from_pb(message))
    assert count_newer(passed) == count_newer(message) > 0


def test_a_state_of_a_newer_protocol_passes_through():
    message = connection_pb2.Connection(state=99)
    assert wire.to_pb(wire.from_pb(message)).state == 99


def graft(message):
    """Add an unknown field to message and to everything in it that has a value of its own."""
    for field, value in message.ListFields():
        entry = field.message_type
        if entry is None or entry.full_name in NO_VALUE_OF_ITS_OWN:
            continue
        if entry.GetOptions().map_entry:
            of = entry.fields_by_name["value"].message_type
            if of is not None and of.full_name not in NO_VALUE_OF_ITS_OWN:
                for inner in value.values():
                    graft(inner)
        elif field.is_repeated:
            for inner in value:
                graft(inner)
        else:
            graft(value)
    message.MergeFromString(NEWER)


def count_newer(message):
    return message.SerializeToString().count(NEWER)
