"""A process's settings: one frozen dataclass, read once from the environment.

    @dataclass(frozen=True, kw_only=True)
    class Config(Common):
        dial_timeout: PositiveDuration = 0.75
        \"\"\"How long a next hop may take to answer a dial.\"\"\"

    config = read(Config)

A field is the variable `NSM_` and its name in capitals, unless its metadata says
`{"variable": …}`; the docstring below it is its help; `{"secret": True}` keeps
its value out of every output. Everything wrong is said at once, each with the
variable, what was given and what is expected.

This is the only module that reads the environment.
"""

import ast
import difflib
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nsm.domains import show_server
from nsm.errors import InvalidError, NsmError
from nsm.process.forms import (
    Count,
    DnsServer,
    Duration,
    Form,
    Level,
    Listening,
    Port,
    PositiveDuration,
    Url,
    boolean,
    integer,
    listening,
)

__all__ = [
    "Common",
    "ConfigError",
    "Count",
    "DnsServer",
    "Duration",
    "Form",
    "Level",
    "Listening",
    "Port",
    "PositiveDuration",
    "Url",
    "for_children",
    "parse",
    "read",
    "resolved",
    "rows",
    "strangers",
    "table",
]

C = TypeVar("C")
_FIGURES, _FIGURES_AT = "PROMETHEUS", "NSM_PROMETHEUS_LISTEN_ON"
_WATCHING = ("NSM_LOOP_GUARD", _FIGURES)
ASKED_WRONGLY = 2  # exit code

# Upstream's manifests set these for their own processes; nothing here reads them (§11.2, §11.3).
UPSTREAM_ONLY = frozenset(
    f"NSM_{name}"
    for name in (
        "BASE_DIR",
        "CGROUP_PATH",
        "DEVICE_PLUGIN_PATH",
        "DEVICE_SELECTOR_FILE",
        "EXPIRE_PERIOD",
        "KUBELET_QPS",
        "MECHANISM",
        "METRICS_EXPORT_INTERVAL",
        "OPEN_TELEMETRY_ENDPOINT",
        "PCI_DEVICES_PATH",
        "PCI_DRIVERS_PATH",
        "POD_RESOURCES_PATH",
        "PPROF_ENABLED",
        "PPROF_LISTEN_ON",
        "PROMETHEUS_CA_FILE",
        "PROMETHEUS_CERT_FILE",
        "PROMETHEUS_KEY_FILE",
        "PROMETHEUS_MAX_BIND_THRESHOLD",
        "PROMETHEUS_MONITOR_CERTIFICATE",
        "PROMETHEUS_SERVER_HEADER_TIMEOUT",
        "REGISTRY_CLIENT_POLICIES",
        "REGISTRY_SERVER_POLICIES",
        "RESOURCE_POLL_TIMEOUT",
        "SRIOV_CONFIG_FILE",
        "VFIO_PATH",
        "VPP_API_SOCKET",
        "VPP_INIT",
        "VPP_INIT_PARAMS",
        "VPP_MIN_OPERATION_TIMEOUT",
    )
)
UPSTREAM_PREFIXES = ("NSM_SRIOV_TOKENS_",)


class ConfigError(InvalidError):
    """Everything that is wrong with the settings: one sentence each, in `problems`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every process can be told; a process's own Config inherits from it."""

    name: str = ""
    """What the process calls itself on every path. Unique in the domain."""

    log_level: Level = "INFO"
    """What is worth a line in the log. SIGUSR1 sets TRACE, SIGUSR2 this one again."""

    stop_grace: PositiveDuration = 10.0
    """How long an orderly stop may take before it is forced, as by a second signal."""

    ready_fd: Annotated[int, Form(integer(-1, 1 << 20), "a file descriptor's number")] = -1
    """An inherited file descriptor that gets one line once the process is ready; -1 is none."""

    loop_guard: str = ""
    """A file that gets every call which can block the event loop, with its stack. For tests."""

    health_file: str = ""
    """A file for probes. It says `serving`, or why not; one older than some seconds is that of a
    process that hangs. Gone when the process ends."""

    prometheus: bool = field(default=False, metadata={"variable": "PROMETHEUS"})
    """Whether counts and gauges are served for Prometheus, over plain HTTP."""

    prometheus_listen_on: Listening = ("127.0.0.1", 8081)
    """Where; each process of a host has a port of its own, 0 is a free one, which its log names.
    Whoever reaches it reads it: beyond loopback, have something with TLS in front of it."""

    notify_socket: str = field(default="", metadata={"variable": "NOTIFY_SOCKET"})
    """Where systemd waits for READY=1 and STOPPING=1."""

    watchdog_usec: Annotated[int, Form(integer(0, 1 << 62), "a number of microseconds")] = field(
        default=0, metadata={"variable": "WATCHDOG_USEC"}
    )
    """How often systemd wants to hear, in microseconds, that the event loop turns; 0 is never."""

    watchdog_pid: Annotated[int, Form(integer(0, 1 << 62), "a process's number")] = field(
        default=0, metadata={"variable": "WATCHDOG_PID"}
    )
    """Which process systemd wants to hear that of; 0 is any."""

    no_color: str = field(default="", metadata={"variable": "NO_COLOR"})
    """Anything but nothing: no colours in the log, even on a terminal."""


def read(
    kind: type[C], environ: Mapping[str, str] | None = None, arguments: Sequence[str] | None = None
) -> C:
    """The settings of this process, or its end with a sentence per problem (exit code 2).

    `--help` prints every variable and ends, `--check` the resolved settings.
    environ and arguments are the process's own unless given.
    """
    environ = os.environ if environ is None else environ
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(table(kind))
        raise SystemExit(0)
    if surplus := [argument for argument in arguments if argument != "--check"]:
        sys.stderr.write(
            f"unknown argument {surplus[0]!r}: settings come from NSM_* variables;"
            " --help lists them, --check shows what they resolve to\n"
        )
        raise SystemExit(ASKED_WRONGLY)
    try:
        config = parse(kind, environ)
    except ConfigError as error:
        sys.stderr.write(f"{error.message}\n")
        from nsm.process.notify import Notifier  # with a loop's modules, which only this needs

        Notifier(environ.get("NOTIFY_SOCKET", "")).failed("; ".join(error.problems))
        raise SystemExit(ASKED_WRONGLY) from None
    if arguments:
        sys.stdout.write(resolved(config, environ))
        sys.stderr.write("".join(f"{line}\n" for line in strangers(kind, environ)))
        raise SystemExit(0)
    return config


def parse(kind: type[C], environ: Mapping[str, str] | None = None) -> C:
    """The settings in environ, or in our own; raises ConfigError with every problem there is."""
    environ = os.environ if environ is None else environ
    problems: list[str] = []
    values: dict[str, Any] = {}
    for setting in _settings(kind):
        given = environ.get(setting.variable)
        if given is None:
            if setting.required:
                problems.append(f"{setting.variable} is not set; expected {setting.form.expected}")
            continue
        try:
            values[setting.field.name] = setting.form.parse(given)
        except (NsmError, ValueError) as error:
            shown = "(hidden)" if setting.secret else repr(_short(given))
            why = f" ({error})" if isinstance(error, NsmError) and not setting.secret else ""
            problems.append(f"{setting.variable} is {shown}; expected {setting.form.expected}{why}")
    if problems:
        raise ConfigError(problems)
    try:
        return kind(**values)
    except (NsmError, ValueError) as error:  # what only shows when they are seen together
        raise ConfigError([str(error)]) from error


def for_children(
    environ: Mapping[str, str] | None = None, *, also: Sequence[str] = ()
) -> dict[str, str]:
    """What a program hands on to processes of ours that it gives an environment of their own.

    That is what watches over all of them, however deep they were started, and of the names in
    also those that are set. Figures are served at free ports: one that is named is the
    program's own, and whoever else is told to take it does not start.
    """
    environ = os.environ if environ is None else environ
    found = {name: environ[name] for name in (*_WATCHING, *also) if name in environ}
    if _FIGURES in found:
        said = environ.get(_FIGURES_AT, show_server(Common.prometheus_listen_on))
        with suppress(ValueError):  # whoever reads it says what is wrong with it
            said = show_server((listening(said)[0], 0))
        found[_FIGURES_AT] = said
    return found


def strangers(kind: type[Any], environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """One sentence for each NSM_* variable that is set and that this process does not read."""
    environ = os.environ if environ is None else environ
    known = {setting.variable for setting in _settings(kind)}
    found = []
    for name in sorted(environ):
        if not name.startswith("NSM_") or name in known:
            continue
        if name in UPSTREAM_ONLY or name.startswith(UPSTREAM_PREFIXES):
            found.append(f"{name} is set, but has no effect here: it is read upstream only")
        elif near := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            found.append(f"{name} is set, but not read here; did you mean {near[0]}?")
        else:
            found.append(f"{name} is set, but not read here; --help lists what is")
    return tuple(found)


def resolved(config: object, environ: Mapping[str, str]) -> str:
    """Each variable with the value in force, and whether the environment said so."""
    lines = []
    for setting in _settings(type(config)):
        value = getattr(config, setting.field.name)
        shown = "(hidden)" if setting.secret and value else setting.show(value)
        source = "environment" if setting.variable in environ else "default"
        lines.append(f"{setting.variable}={shown}  # {source}\n")
    return "".join(lines)


def table(kind: type[Any]) -> str:
    """Every variable with its default and its meaning, for people."""
    lines = [f"{inspect.getdoc(kind) or kind.__name__}\n\n", "Settings (environment variables):\n"]
    for setting in _settings(kind):
        default = "required" if setting.required else f"[{setting.show(setting.default)}]"
        lines.append(f"\n  {setting.variable}  {default}\n")
        text = f"{setting.help} Expected: {setting.form.expected}.".strip()
        lines.append(textwrap.fill(text, 78, initial_indent=" " * 6, subsequent_indent=" " * 6))
        lines.append("\n")
    lines.append("\nArguments: --check prints the resolved settings, --help this text.\n")
    return "".join(lines)


def rows(kind: type[Any]) -> Iterator[tuple[str, str, str]]:
    """Variable, default and meaning of each setting, for a page."""
    for setting in _settings(kind):
        yield (
            setting.variable,
            "required" if setting.required else setting.show(setting.default),
            setting.help,
        )


@dataclass(frozen=True, slots=True)
class _Setting:
    field: Field[Any]
    form: Form
    help: str

    @property
    def variable(self) -> str:
        name: str = self.field.metadata.get("variable", f"NSM_{self.field.name.upper()}")
        return name

    @property
    def secret(self) -> bool:
        return bool(self.field.metadata.get("secret"))

    @property
    def required(self) -> bool:
        return self.field.default is MISSING and self.field.default_factory is MISSING

    @property
    def default(self) -> Any:
        factory = self.field.default_factory
        return self.field.default if factory is MISSING else factory()

    def show(self, value: Any) -> str:
        return "" if value is None else self.form.show(value)


def _settings(kind: type[Any]) -> Iterator[_Setting]:
    hints = get_type_hints(kind, include_extras=True)
    helps = {
        name: text for base in reversed(kind.__mro__) for name, text in _docstrings(base).items()
    }
    for one in fields(kind):
        yield _Setting(one, _form(hints[one.name], one.name), helps.get(one.name, ""))


def _docstrings(kind: type[Any]) -> dict[str, str]:
    """The strings that stand below a class's fields."""
    if kind is object:
        return {}
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        before.target.id: inspect.cleandoc(after.value.value).replace("\n", " ")
        for before, after in zip(body.body, body.body[1:], strict=False)
        if isinstance(before, ast.AnnAssign)
        and isinstance(before.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }


_PLAIN: Mapping[type, Form] = {
    str: Form(str, "text"),
    int: Form(integer(-(1 << 63), (1 << 63) - 1), "a whole number"),
    bool: Form(boolean, "true or false", lambda value: str(value).lower()),
}


def _form(hint: Any, name: str) -> Form:
    """How a field of this type is written; TypeError where we have no rule for it."""
    if get_origin(hint) is Annotated:
        for extra in hint.__metadata__:
            if isinstance(extra, Form):
                return extra
        return _form(hint.__origin__, name)
    if hint in _PLAIN:
        return _PLAIN[hint]
    arguments = get_args(hint)
    origin = get_origin(hint)
    if origin is Literal:
        return Form(_one_of(arguments), "one of " + ", ".join(arguments))
    if origin in {Union, UnionType} and NoneType in arguments and len(arguments) == 2:
        inner = _form(next(one for one in arguments if one is not NoneType), name)
        return Form(_or_none(inner.parse), f"{inner.expected}, or nothing", _show_or_none(inner))
    if origin is tuple and arguments[1:] == (Ellipsis,):
        return _list(_form(arguments[0], name))
    if origin in {Mapping, dict} and arguments[0] is str:
        return _map(_form(arguments[1], name))
    raise TypeError(f"{name}: no rule to read a {hint} from a variable; annotate it with a Form")


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return parse


def _or_none(inner: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: inner(text) if text else None


def _show_or_none(inner: Form) -> Callable[[Any], str]:
    return lambda value: "" if value is None else inner.show(value)


def _list(inner: Form) -> Form:
    return Form(
        lambda text: (
            tuple(inner.parse(one.strip()) for one in text.split(",")) if text.strip() else ()
        ),
        f"a list, separated by commas, of: {inner.expected}",
        lambda values: ",".join(map(inner.show, values)),
    )


def _map(inner: Form) -> Form:
    def parse(text: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for pair in text.split(",") if text.strip() else ():
            key, colon, value = pair.partition(":")
            if not colon or not key.strip() or key.strip() in found:
                raise ValueError(pair)
            found[key.strip()] = inner.parse(value.strip())
        return found

    return Form(
        parse,
        f"key:value pairs, separated by commas; each value {inner.expected}",
        lambda values: ",".join(f"{key}:{inner.show(value)}" for key, value in values.items()),
    )


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"
