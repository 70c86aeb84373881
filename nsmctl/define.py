"""`nsmctl define`: network services and their rules, as a file says them (`wire.md` §7.1).

The form is that of Kubernetes' resource NetworkService, so a file that is written for upstream
can be given as it is:

    kind: NetworkService
    metadata: {name: orders}
    spec:
      payload: IP
      matches:
        - source_selector: {tier: web}
          routes: [{destination_selector: {version: blue}, weight: 2}]
          fallthrough: true
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
import yaml

from nsm.errors import InvalidError
from nsm.model import Destination, Match, Service
from nsm.written import known
from nsmctl import show
from nsmctl.asking import (
    AGENT,
    MANAGER,
    PATIENCE,
    Identity,
    Json,
    Lab,
    Manager,
    Node,
    asked,
)

if TYPE_CHECKING:
    from labs.seats import Seat
    from nsm.rpc.peers import Peers

KIND: Final = "NetworkService"
PAYLOADS: Final = ("ETHERNET", "IP")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog="Example: nsmctl define orders.yaml --manager tcp://198.51.100.7:5002")(
        define
    )


def define(
    file: Annotated[str, typer.Argument(help="YAML; - is standard input.")],
    lab: Lab = "",
    node: Node = "",
    manager: Manager = MANAGER,
    identity: Identity = AGENT,
    json_: Json = False,
) -> None:
    """Register network services: what each carries, and its rules for who serves whom.

    The file has them as Kubernetes has a resource NetworkService, several with --- between. One
    that is there already is changed, by whoever registered it first. Wires that stand stay.
    """
    wanted = parse(_read(file), file)

    async def ask(seat: "Seat", peers: "Peers") -> list[Service]:
        from nsm.rpc.registry import RegistryClient

        client = RegistryClient(peers, seat.manager, dial_timeout=PATIENCE)
        return [(await client.register_service(one)).item for one in wanted]

    made = asked(ask, lab, node, manager, identity)
    if json_:
        show.as_json([{"name": s.name, "payload": s.payload, "matches": s.matches} for s in made])
        return
    for one in made:
        rules = f"{len(one.matches)} rule{'' if len(one.matches) == 1 else 's'}"
        show.line(f"{one.name}  {one.payload}  {rules}")


def _read(file: str) -> str:
    try:
        if file == "-":
            return sys.stdin.read()
        with open(file) as text:
            return text.read()
    except (OSError, UnicodeDecodeError) as wrong:
        raise InvalidError(f"{file}: cannot be read: {wrong}") from None


# --- the file --------------------------------------------------------------------------------


def parse(text: str, where: str) -> tuple[Service, ...]:
    """The services a text defines; raises InvalidError that names where, which, and why."""
    try:
        said = [one for one in yaml.safe_load_all(text) if one is not None]
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{where}:{mark.line + 1}" if mark else where
        raise InvalidError(f"{line}: no YAML: {getattr(error, 'problem', error)}") from None
    if not said:
        raise InvalidError(f"{where}: there is no {KIND} in it")
    return tuple(_service(one, where) for one in said)


def _service(said: Any, where: str) -> Service:
    whole = known(said, {"apiVersion", "kind", "metadata", "spec"}, where)
    if whole.get("kind") != KIND:
        raise InvalidError(f"{where}: kind is {whole.get('kind')!r}, expected {KIND}")
    name = _mapping(whole, "metadata", where).get("name")
    if not isinstance(name, str) or not name:
        raise InvalidError(f"{where}: metadata.name is missing")
    where = f"{where}: {name}"
    spec = known(whole.get("spec") or {}, {"name", "payload", "matches"}, f"{where}: spec")
    payload = str(spec.get("payload") or PAYLOADS[0]).upper()
    if payload not in PAYLOADS:
        raise InvalidError(f"{where}: payload is {payload}, expected {' or '.join(PAYLOADS)}")
    matches = _list(spec, "matches", where)
    return Service(
        name=name,
        payload=payload,
        matches=tuple(_match(one, f"{where}: rule {i}") for i, one in enumerate(matches, 1)),
    )


def _match(said: Any, where: str) -> Match:
    fields = known(said, {"source_selector", "routes", "fallthrough", "metadata"}, where)
    falls = fields.get("fallthrough", False)
    if not isinstance(falls, bool):
        raise InvalidError(f"{where}: fallthrough is neither true nor false")
    labels = None
    if "metadata" in fields:
        told = known(fields["metadata"] or {}, {"labels"}, f"{where}: metadata")
        labels = _labels(told, "labels", f"{where}: metadata")
    return Match(
        source_selector=_labels(fields, "source_selector", where),
        routes=tuple(
            _route(one, f"{where}, route {i}")
            for i, one in enumerate(_list(fields, "routes", where), 1)
        ),
        fallthrough=falls,
        metadata=labels,
    )


def _route(said: Any, where: str) -> Destination:
    fields = known(said, {"destination_selector", "weight"}, where)
    weight = fields.get("weight", 0)
    if not isinstance(weight, int) or isinstance(weight, bool) or not 0 <= weight < 1 << 32:
        raise InvalidError(f"{where}: weight is no whole number from 0 upwards")
    return Destination(_labels(fields, "destination_selector", where), weight)


def _labels(fields: Mapping[str, Any], key: str, where: str) -> dict[str, str]:
    said = _mapping(fields, key, where)
    if not all(isinstance(one, str) for pair in said.items() for one in pair):
        raise InvalidError(f"{where}: {key} has a label or value that is no text: quote it")
    return said


def _mapping(fields: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    said = fields.get(key) or {}
    if not isinstance(said, dict):
        raise InvalidError(f"{where}: {key} is no mapping")
    return said


def _list(fields: Mapping[str, Any], key: str, where: str) -> list[Any]:
    said = fields.get(key) or []
    if not isinstance(said, list):
        raise InvalidError(f"{where}: {key} is no list")
    return said
