"""Is this a lab file? Answers with line, what was found, what was expected.

`schema.json` is the whole grammar, so that editors can complete it; here its
verdicts become sentences. Keys that belong to pieces still to come are told
apart from typing errors: whoever writes one should not look for a mistake.
"""

import difflib
import ipaddress
import json
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from typing import Any, Final

from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

from labs.source import Source, Where, spell
from nsm import nsurl
from nsm.errors import InvalidError
from nsm.mechanisms import KERNEL

MOST: Final = 20  # problems told at once: more than that nobody reads

# Path with `*` for any name or index -> what is missing, and what to use meanwhile.
NOT_YET: Final[Mapping[tuple[str, ...], str]] = {
    ("topology", "links", "*", "delay"): "delays of links; what works: mtu, rate",
    ("topology", "links", "*", "loss"): "losses of links; what works: mtu, rate",
    ("services", "*", "dns"): "names of endpoints; what works: vl3: {dns: ...}, for its members",
    ("clients", "*", "dns"): "names of clients; what works: services.*.vl3.dns",
    ("faults",): "faults; what works: checks, with fault: {kill: ...} and others",
}
_NOT_YET_VALUES: Final[Mapping[str, str]] = {
    "kind: router": "is not yet there; what works: node and switch",
}
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_UNUSABLE: Final[Mapping[Network, str]] = {
    ipaddress.ip_network("0.0.0.0/8"): "unspecified",
    ipaddress.ip_network("127.0.0.0/8"): "loopback",
    ipaddress.ip_network("224.0.0.0/4"): "multicast",
    ipaddress.ip_network("240.0.0.0/4"): "reserved",
    ipaddress.ip_network("::/127"): "unspecified and loopback",
    ipaddress.ip_network("ff00::/8"): "multicast",
}


def document() -> dict[str, Any]:
    """The JSON Schema of lab files."""
    text = resources.files("labs").joinpath("schema.json").read_text()
    schema: dict[str, Any] = json.loads(text)
    return schema


def check(source: Source) -> None:
    """Hold a file against the schema.

    Raises InvalidError with one line per problem, in the order of the file.
    """
    validator = _Validator(document(), format_checker=_formats())
    found: list[tuple[int, str]] = []
    for error in validator.iter_errors(source.data):
        for where, around, says in _sentences(error):
            place = source.at(where)
            line = int(place.rpartition(":")[2])
            found.append((line, f"{place}: {_labelled(around)}{says}"))
    if found:
        lines = list(dict.fromkeys(text for _, text in sorted(found)))
        more = [f"... and {len(lines) - MOST} more"] if len(lines) > MOST else []
        raise InvalidError("\n".join((*lines[:MOST], *more)))


def _whole(_validator: object, pattern: str, text: object, _: object) -> Iterator[ValidationError]:
    """The keyword `pattern`, where `$` is the end: Python's stands before a last newline too."""
    if isinstance(text, str) and not re.fullmatch(pattern, text):
        yield ValidationError(f"{text!r} does not match {pattern!r}")


def _is_integer(_checker: object, value: object) -> bool:
    """Without 5.0, which JSON Schema calls an integer, and the kernel's formats do not."""
    return isinstance(value, int) and not isinstance(value, bool)


_Validator: Final = extend(  # type: ignore[no-untyped-call]  # its stubs leave it out
    Draft202012Validator,
    {"pattern": _whole},
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)


def nearest(word: str, known: Iterator[str] | list[str]) -> str:
    """`; did you mean "x"?`, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def _labelled(where: Where) -> str:
    return f"{spell(where)}: " if where else ""


def _sentences(error: ValidationError) -> Iterator[tuple[Where, Where, str]]:
    """Of each problem: whose line to show, which place to name, and what is wrong there."""
    where: Where = tuple(error.absolute_path)
    schema = error.schema if isinstance(error.schema, dict) else {}
    match error.validator:
        case "additionalProperties" if isinstance(error.instance, dict):
            known = list(schema.get("properties", {}))
            for key in error.instance:
                if key not in known:
                    yield (*where, str(key)), where, _unknown(where, str(key), known)
        case "required":
            missing = error.message.split("'")[1]
            yield where, where, f'"{missing}" is missing'
        case "propertyNames":
            yield (*where, str(error.instance)), where, _wrong(error)
        case "oneOf":
            kinds = [next(iter(option["required"])) for option in schema["oneOf"]]
            item: Any = error.instance
            if not isinstance(item, dict):
                return  # that is said already
            there = [kind for kind in kinds if kind in item]
            got = " and ".join(there) if there else "none"
            yield where, where, f"found {got}, expected exactly one of {', '.join(kinds)}"
        case _:
            yield where, where, _wrong(error)


def _unknown(where: Where, key: str, known: list[str]) -> str:
    path = tuple(str(step) for step in (*where, key))
    for pattern, sentence in NOT_YET.items():
        if len(path) == len(pattern) and all(
            b in ("*", a) for a, b in zip(path, pattern, strict=True)
        ):
            return f"{key}: not yet: {sentence}"
    hint = nearest(key, known) or f"; known: {', '.join(known)}"
    return f'unknown key "{key}"{hint}'


def _wrong(error: ValidationError) -> str:
    schema = error.schema if isinstance(error.schema, dict) else {}
    value = error.instance
    text = f"{next(reversed(error.absolute_path), '')}: {value}"
    if error.validator in ("enum", "type") and text in _NOT_YET_VALUES:
        return f"{text} {_NOT_YET_VALUES[text]}"
    if error.validator == "format" and isinstance(error.cause, InvalidError):
        return str(error.cause)
    return f"found {_shown(value)}, expected {_expected(error, schema)}"


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else text[:57] + "..."


_TYPES: Final = {
    "object": "a mapping",
    "array": "a list",
    "string": "text",
    "integer": "a whole number",
    "boolean": "true or false",
}


def _expected(error: ValidationError, schema: Mapping[str, Any]) -> str:
    what = schema.get("description", "")
    match error.validator:
        case "type":
            kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            text = " or ".join(_TYPES.get(str(kind), str(kind)) for kind in kinds)
            if schema["type"] == "integer" and "maximum" in schema:
                text += f" from {schema.get('minimum', 0)} to {schema['maximum']}"
        case "enum":
            return " or ".join(map(str, schema["enum"]))
        case "minimum" | "maximum":
            return f"{schema.get('minimum', '')} to {schema.get('maximum', '')}"
        case "minItems" | "maxItems":
            low, high = schema.get("minItems", 0), schema.get("maxItems", "any number")
            text = f"{low}" if low == high else f"{low} to {high}"
            return f"{text} items"
        case "minProperties":
            return "at least one key"
        case "uniqueItems":
            return "no item twice"
        case "format":
            text = str(schema["format"]).replace("-", " ")
        case "pattern":
            return str(what) or f"text like {schema['pattern']}"
        case _:
            return f"{error.validator} {error.validator_value}"
    return f"{text}: {what}" if what else text


def _formats() -> FormatChecker:
    checker = FormatChecker(formats=())

    def add(name: str, read: Callable[[str], object]) -> None:
        def holds(value: object) -> bool:
            if isinstance(value, str):
                read(value)
            return True

        checker.checks(name, raises=(ValueError, InvalidError))(holds)

    add("ipv4", ipaddress.IPv4Address)
    add("ipv6", ipaddress.IPv6Address)
    add("ipv4-prefix", lambda text: _prefix(text, ipaddress.IPv4Network))
    add("ipv6-prefix", lambda text: _prefix(text, ipaddress.IPv6Network))
    add("prefix", lambda text: _prefix(text, ipaddress.ip_network))
    add("address", ipaddress.ip_address)
    add("nsurl", _nsurl)
    return checker


def _prefix(text: str, read: Callable[[str], Network]) -> None:
    network = read(text)
    if "/" not in text:
        raise InvalidError(f"{text} has no length: write {network.network_address}/24, or so")
    for other, what in _UNUSABLE.items():
        if network.version == other.version and network.overlaps(other):
            raise InvalidError(f"{text} holds {what} addresses, which no interface can have")


def _nsurl(text: str) -> None:
    asked = nsurl.parse(text)
    if asked.mechanism != KERNEL:
        raise InvalidError(f"{text}: a lab's wires are kernel://SERVICE/INTERFACE")
    if asked.interface == "lo":
        raise InvalidError(f"{text}: lo is there already")
