"""Every field of every message that has a value survives decoding and encoding."""

import gc
import tracemalloc
from dataclasses import replace

import pytest
from google.protobuf.descriptor import FieldDescriptor

from nsm.model import SECOND
from nsm.proto import connection_pb2, connectioncontext_pb2, networkservice_pb2, registry_pb2
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
    assert passed == message


def test_what_a_newer_peer_says_of_a_leaf_only_is_kept_and_goes_with_it():
    """Nothing but a Timestamp, a family or one service's labels is of the newer protocol."""
    segment = full(connection_pb2.PathSegment)
    segment.expires.MergeFromString(NEWER)
    value = wire.segment(segment)
    assert wire.to_pb(value) == segment
    later = wire.to_pb(replace(value, expires=9 * SECOND))
    assert (later.expires.seconds, count_newer(later.expires)) == (9, 1)
    assert not wire.to_pb(replace(value, expires=None)).HasField("expires")

    context = connectioncontext_pb2.IPContext()
    context.extra_prefix_request.add().addr_family.MergeFromString(NEWER)
    (asked,) = wire.connection(of_ip(context)).ip.extra_prefix_requests
    assert wire.to_pb(asked) == context.extra_prefix_request[0]
    assert not wire.to_pb(replace(asked, family=None)).HasField("addr_family")

    endpoint = registry_pb2.NetworkServiceEndpoint(name="nse")
    endpoint.network_service_labels["a"].labels["app"] = "x"
    endpoint.network_service_labels["b"].MergeFromString(NEWER)
    endpoint.initial_registration_time.MergeFromString(NEWER)
    held = wire.endpoint(endpoint)
    assert wire.to_pb(held) == endpoint
    more = wire.to_pb(replace(held, labels={"a": {}, "b": {"nodeName": "n"}}))
    assert dict(more.network_service_labels["b"].labels) == {"nodeName": "n"}
    assert count_newer(more.network_service_labels["b"]) == 1
    fewer = wire.to_pb(replace(held, labels={"a": {}}))
    assert list(fewer.network_service_labels) == ["a"]


def of_ip(context):
    return connection_pb2.Connection(
        context=connectioncontext_pb2.ConnectionContext(ip_context=context)
    )


def test_a_state_of_a_newer_protocol_passes_through():
    message = connection_pb2.Connection(state=99)
    assert wire.to_pb(wire.from_pb(message)).state == 99


def as_it_comes(n):
    """A connection over one node as its client has it, with all a hop says of itself, as bytes."""
    message = connection_pb2.Connection(
        id=f"c-{n}",
        network_service="icmp-responder",
        network_service_endpoint_name="icmp-responder-7c9b8f5d4-abcde",
        payload="ETHERNET",
        labels={"nodeName": "node-1"},
    )
    message.mechanism.cls, message.mechanism.type = "LOCAL", "KERNEL"
    for hop in ("nsc", "nsmgr-node-1", "forwarder-node-1", "icmp-responder-7c9b8f5d4-abcde"):
        metrics = {f"{word}_ms": f"{n}.25" for word in ("took", "find", "kernel", "policy")}
        message.path.path_segments.add(name=hop, id=f"{hop}/{n}", metrics=metrics)
    message.context.ip_context.excluded_prefixes.extend(f"172.16.1.{i}/32" for i in range(20))
    return message.SerializeToString()


def test_what_is_said_with_the_words_of_before_costs_no_other_words():
    came = [as_it_comes(n) for n in range(201)]
    held = [wire.connection(connection_pb2.Connection.FromString(came.pop()))]
    gc.collect()
    tracemalloc.start()
    try:
        for one in came:
            held.append(wire.connection(connection_pb2.Connection.FromString(one)))
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(held) == 201
    assert kept / 200 < 4_500


def test_words_of_no_end_are_not_kept_without_end():
    few, long = connection_pb2.Mechanism(), connection_pb2.Mechanism(type="x" * 4096)
    for n in range(5000):
        few.type = f"type {n}"
        wire.mechanism(few)
    assert wire.mechanism(long) == wire.Mechanism(type="x" * 4096)
    assert len(wire._known) <= 2048
    assert max(map(len, wire._known)) <= 100


def graft(message):
    """Add an unknown field to message and to everything in it."""
    for field, value in message.ListFields():
        entry = field.message_type
        if entry is None:
            continue
        if entry.GetOptions().map_entry:
            of = entry.fields_by_name["value"].message_type
            if of is not None:
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
