import datetime

from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Lease(_message.Message):
    __slots__ = ("prefix", "owner", "ends")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    prefix: str
    owner: str
    ends: _timestamp_pb2.Timestamp
    def __init__(self, prefix: _Optional[str] = ..., owner: _Optional[str] = ..., ends: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Pool(_message.Message):
    __slots__ = ("name", "prefixes", "ipv4_length", "ipv6_length", "leases")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    IPV4_LENGTH_FIELD_NUMBER: _ClassVar[int]
    IPV6_LENGTH_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    name: str
    prefixes: _containers.RepeatedScalarFieldContainer[str]
    ipv4_length: int
    ipv6_length: int
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    def __init__(self, name: _Optional[str] = ..., prefixes: _Optional[_Iterable[str]] = ..., ipv4_length: _Optional[int] = ..., ipv6_length: _Optional[int] = ..., leases: _Optional[_Iterable[_Union[Lease, _Mapping]]] = ...) -> None: ...

class Pools(_message.Message):
    __slots__ = ("pools",)
    POOLS_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.RepeatedCompositeFieldContainer[Pool]
    def __init__(self, pools: _Optional[_Iterable[_Union[Pool, _Mapping]]] = ...) -> None: ...

class PoolDeletion(_message.Message):
    __slots__ = ("name", "force")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    force: bool
    def __init__(self, name: _Optional[str] = ..., force: _Optional[bool] = ...) -> None: ...

class Holding(_message.Message):
    __slots__ = ("number", "address", "holder", "left", "refused", "elsewhere")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    ELSEWHERE_FIELD_NUMBER: _ClassVar[int]
    number: int
    address: str
    holder: str
    left: bool
    refused: bool
    elsewhere: bool
    def __init__(self, number: _Optional[int] = ..., address: _Optional[str] = ..., holder: _Optional[str] = ..., left: _Optional[bool] = ..., refused: _Optional[bool] = ..., elsewhere: _Optional[bool] = ...) -> None: ...
