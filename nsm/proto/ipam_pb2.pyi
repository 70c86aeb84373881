from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Type(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNDEFINED: _ClassVar[Type]
    ALLOCATE: _ClassVar[Type]
    DELETE: _ClassVar[Type]
UNDEFINED: Type
ALLOCATE: Type
DELETE: Type

class PrefixRequest(_message.Message):
    __slots__ = ("type", "prefix", "exclude_prefixes")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_PREFIXES_FIELD_NUMBER: _ClassVar[int]
    type: Type
    prefix: str
    exclude_prefixes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, type: _Optional[_Union[Type, str]] = ..., prefix: _Optional[str] = ..., exclude_prefixes: _Optional[_Iterable[str]] = ...) -> None: ...

class PrefixResponse(_message.Message):
    __slots__ = ("prefix", "exclude_prefixes")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_PREFIXES_FIELD_NUMBER: _ClassVar[int]
    prefix: str
    exclude_prefixes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, prefix: _Optional[str] = ..., exclude_prefixes: _Optional[_Iterable[str]] = ...) -> None: ...
