"""What we send is what the protocol says, field by field.

The tables are typed from the protocol's description, not made from our .proto
files; for the two protocols that are not the mesh's own, other people's
packages are asked.
"""

import csv
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import (
    Descriptor,
    EnumDescriptor,
    FieldDescriptor,
    FileDescriptor,
    MethodDescriptor,
)

DATA = Path(__file__).parents[2] / "data"
OURS = ("networkservice", "connection", "connectioncontext", "registry", "ipam")
SCALARS = {
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
    FieldDescriptor.TYPE_DOUBLE: "double",
}
Row = tuple[str, ...]


def table(name: str) -> set[Row]:
    with (DATA / name).open() as file:
        rows = [tuple(row) for row in csv.reader(file, delimiter="\t") if row[0][0] != "#"]
    assert len(rows) == len(set(rows)), f"{name}: a row is there twice"
    return set(rows)


def file_of(name: str) -> FileDescriptor:
    descriptor = importlib.import_module(f"nsm.proto.{name}_pb2").DESCRIPTOR
    assert isinstance(descriptor, FileDescriptor)
    return descriptor


def type_of(field: FieldDescriptor) -> str:
    if field.message_type is not None:
        return field.message_type.full_name
    if field.enum_type is not None:
        return field.enum_type.full_name
    return SCALARS[field.type]


def is_map(message: Descriptor) -> bool:
    return message.GetOptions().map_entry


def enum_rows(enum: EnumDescriptor) -> Iterator[Row]:
    for value in enum.values:
        yield enum.full_name, value.name, str(value.number), "value", "-"


def message_rows(message: Descriptor) -> Iterator[Row]:
    for field in message.fields:
        kind, label = type_of(field), "repeated" if field.is_repeated else "one"
        if field.message_type is not None and is_map(field.message_type):
            entry = field.message_type.fields_by_name
            kind, label = f"{type_of(entry['key'])},{type_of(entry['value'])}", "map"
        yield message.full_name, field.name, str(field.number), kind, label
    if not message.fields:
        yield message.full_name, "-", "-", "-", "-"
    for nested in message.nested_types:
        if not is_map(nested):
            yield from message_rows(nested)
    for enum in message.enum_types:
        yield from enum_rows(enum)


def rows_of(file: FileDescriptor) -> set[Row]:
    return {
        *(row for message in file.message_types_by_name.values() for row in message_rows(message)),
        *(row for enum in file.enum_types_by_name.values() for row in enum_rows(enum)),
    }


def method_row(method: MethodDescriptor) -> Row:
    return (
        f"/{method.containing_service.full_name}/{method.name}",
        "stream " * method.client_streaming + method.input_type.full_name,
        "stream " * method.server_streaming + method.output_type.full_name,
    )


def methods_of(file: FileDescriptor) -> set[Row]:
    return {
        method_row(method)
        for service in file.services_by_name.values()
        for method in service.methods
    }


def test_every_field_is_the_protocols_and_none_is_missing() -> None:
    assert set().union(*(rows_of(file_of(name)) for name in OURS)) == table("wire-fields.tsv")


def test_every_method_is_the_protocols_and_none_is_missing() -> None:
    assert set().union(*(methods_of(file_of(name)) for name in OURS)) == table("wire-methods.tsv")


def test_packages_decide_grpc_paths_and_are_the_protocols() -> None:
    assert {file_of(name).package for name in OURS} == set(OURS)


def test_health_is_what_grpc_itself_ships() -> None:
    from grpc_health.v1 import health_pb2 as theirs

    ours = file_of("health")
    newer = {"grpc.health.v1.HealthListRequest", "grpc.health.v1.HealthListResponse"}
    assert rows_of(ours) == {row for row in rows_of(theirs.DESCRIPTOR) if row[0] not in newer}
    listing = "/grpc.health.v1.Health/List"
    assert methods_of(ours) == {row for row in methods_of(theirs.DESCRIPTOR) if row[0] != listing}


def test_the_workload_api_is_what_the_spiffe_package_speaks() -> None:
    from spiffe._proto import workload_pb2 as theirs

    assert rows_of(file_of("workload")) <= rows_of(theirs.DESCRIPTOR)
    assert methods_of(file_of("workload")) <= methods_of(theirs.DESCRIPTOR)


@pytest.mark.parametrize(
    "theirs",
    ["grpc_health.v1.health_pb2", "grpclib.health.v1.health_pb2", "spiffe._proto.workload_pb2"],
)
def test_others_definitions_of_the_same_names_can_be_imported_beside_ours(theirs: str) -> None:
    # In a process of its own, because two of theirs do not go together either.
    program = f"import nsm.proto.health_pb2, nsm.proto.workload_pb2, {theirs}"
    for order in (program, f"import {theirs}; {program}"):
        done = subprocess.run([sys.executable, "-c", order], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
