"""Settings are read as upstream writes them, and everything wrong is said at once."""

import importlib
import importlib.util
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm.errors import InvalidError
from nsm.process import config, forms
from nsm.process.config import Common, ConfigError, Duration, Form, Port, PositiveDuration, Url


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """door: lets people in."""

    name: str = "door"
    """Who it is."""

    dial_timeout: PositiveDuration = 0.75
    """How long a dial may take,
    on both lines."""

    idle_timeout: Duration = 0.0
    """0 is for ever."""

    listen_on: tuple[Url, ...] = ("unix:///run/door.sock",)
    """Where."""

    labels: Mapping[str, str] = field(default_factory=dict)
    """What it is."""

    isolation: Literal["auto", "in-place", "hop"] = "auto"
    """How far apart."""

    port: Port = 0
    """Which."""

    register: bool = True
    """Whether."""

    limit: int | None = None
    """How many; nothing is no limit."""

    password: str = field(default="", metadata={"secret": True})
    """Nobody's business."""

    socket: Url = field(default="", metadata={"variable": "SPIFFE_ENDPOINT_SOCKET"})
    """Whom to ask who we are."""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("750ms", 0.75),
        ("10m", 600),
        ("1h30m", 5400),
        ("0", 0),
        ("0s", 0),
        ("1.5h", 5400),
        (".5s", 0.5),
        ("1.s", 1),
        ("-2s", -2),
        ("+2s", 2),
        ("1us", 1e-6),
        ("1µs", 1e-6),
        ("1μs", 1e-6),
        ("100ns", 1e-7),
        ("1h1m1s1ms", 3661.001),
    ],
)
def test_durations_are_gos(text: str, seconds: float) -> None:
    assert forms.duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "1", "s", "1 s", "1d", "1m ", ".s", "1s1", "--1s", "٣s", "1e3s", "9999999h", "1S"]
)
def test_what_go_refuses_as_a_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        forms.duration(text)


@given(st.integers(min_value=-(10**15), max_value=10**15))
def test_a_shown_duration_reads_back_as_the_same(microseconds: int) -> None:
    seconds = microseconds / 1e6
    assert forms.duration(forms.show_duration(seconds)) == seconds


@pytest.mark.parametrize("text", ["1", "t", "T", "true", "TRUE", "True"])
def test_gos_ways_to_write_true(text: str) -> None:
    assert config.parse(Config, {"NSM_REGISTER": text}).register is True


@pytest.mark.parametrize("text", ["0", "f", "F", "false", "FALSE", "False"])
def test_gos_ways_to_write_false(text: str) -> None:
    assert config.parse(Config, {"NSM_REGISTER": text}).register is False


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp://127.0.0.1:5001",
        "tcp://:5001",
        "tcp://[::1]:0",
        "unix:///var/lib/networkservicemesh/nsm.io.sock",
        "registry:5002",
        "127.0.0.1:5002",
        "dns:///registry",
    ],
)
def test_urls_upstreams_manifests_hold_are_read(text: str) -> None:
    assert forms.url(text) == text


@pytest.mark.parametrize(
    "text",
    ["tcp://host", "tcp://host:65536", "unix://relative", "://x", "tcp://", "host", "a:b", "a b:1"],
)
def test_what_is_no_url_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        forms.url(text)


def test_nothing_set_gives_the_defaults() -> None:
    assert config.parse(Config, {}) == Config()


def test_every_kind_of_value_is_read() -> None:
    found = config.parse(
        Config,
        {
            "NSM_NAME": "east-1",
            "NSM_DIAL_TIMEOUT": "1m",
            "NSM_LISTEN_ON": "unix:///a, tcp://:5001",
            "NSM_LABELS": "app:x, p2p:true,url:tcp://a:1",
            "NSM_ISOLATION": "hop",
            "NSM_PORT": "4789",
            "NSM_LIMIT": "7",
            "NSM_LOG_LEVEL": "warning",
            "SPIFFE_ENDPOINT_SOCKET": "unix:///agent.sock",
        },
    )
    assert found == Config(
        name="east-1",
        dial_timeout=60.0,
        listen_on=("unix:///a", "tcp://:5001"),
        labels={"app": "x", "p2p": "true", "url": "tcp://a:1"},
        isolation="hop",
        port=4789,
        limit=7,
        log_level="WARN",
        socket="unix:///agent.sock",
    )


def test_an_empty_list_or_map_is_empty_and_not_the_default() -> None:
    found = config.parse(Config, {"NSM_LISTEN_ON": "", "NSM_LABELS": "", "NSM_LIMIT": ""})
    assert (found.listen_on, found.labels, found.limit) == ((), {}, None)


def test_all_problems_are_told_at_once_with_variable_given_and_expected() -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(
            Config,
            {
                "NSM_DIAL_TIMEOUT": "5",
                "NSM_LISTEN_ON": "unix:///fine,tcp://nowhere",
                "NSM_LABELS": "app:x,app:y",
                "NSM_ISOLATION": "maybe",
                "NSM_PORT": "70000",
                "NSM_REGISTER": "yes",
                "NSM_LOG_LEVEL": "LOUD",
            },
        )
    assert caught.value.problems == (
        "NSM_LOG_LEVEL is 'LOUD'; expected TRACE, DEBUG, INFO, WARN or ERROR",
        "NSM_DIAL_TIMEOUT is '5'; expected a duration above zero such as 750ms or 10m",
        (
            "NSM_LISTEN_ON is 'unix:///fine,tcp://nowhere'; expected a list, separated by commas,"
            " of: a URL: tcp://host:port, unix:///path or host:port"
        ),
        (
            "NSM_LABELS is 'app:x,app:y'; expected key:value pairs, separated by commas;"
            " each value text"
        ),
        "NSM_ISOLATION is 'maybe'; expected one of auto, in-place, hop",
        "NSM_PORT is '70000'; expected a port: 0 to 65535",
        "NSM_REGISTER is 'yes'; expected true or false",
    )


def test_a_secret_is_in_no_output() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Secret(Common):
        pin: int = field(default=0, metadata={"secret": True})

    with pytest.raises(ConfigError) as caught:
        config.parse(Secret, {"NSM_PIN": "hunter2"})
    shown = config.resolved(Config(password="hunter2"), {})
    assert "hunter2" not in f"{caught.value} {shown}"
    assert "NSM_PASSWORD=(hidden)" in shown


def test_what_is_required_and_missing_is_named() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needy:
        """needs"""

        url: Url

    with pytest.raises(ConfigError, match="NSM_URL is not set; expected a URL"):
        config.parse(Needy, {})


def test_what_only_shows_when_seen_together_is_a_problem_too() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Pair:
        low: int = 0
        high: int = 10

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError(f"NSM_LOW is {self.low}, above NSM_HIGH {self.high}")

    with pytest.raises(ConfigError, match="NSM_LOW is 11, above NSM_HIGH 10"):
        config.parse(Pair, {"NSM_LOW": "11"})


def test_a_parsers_own_sentence_is_shown() -> None:
    def refuse(text: str) -> str:
        raise InvalidError(f"{text} has no scheme")

    @dataclass(frozen=True, kw_only=True)
    class Own:
        service: Annotated[str, Form(refuse, "an NSURL")] = ""

    with pytest.raises(ConfigError, match=r"expected an NSURL \(vpn has no scheme\)"):
        config.parse(Own, {"NSM_SERVICE": "vpn"})


def test_variables_nobody_reads_are_named_with_the_nearest_that_is() -> None:
    environ = {
        "NSM_DAIL_TIMEOUT": "1s",
        "NSM_QUITE_ANOTHER": "",
        "NSM_PPROF_ENABLED": "true",
        "NSM_SRIOV_TOKENS_worker/10G": "x",
        "NSM_NAME": "x",
        "PATH": "/bin",
    }
    assert config.strangers(Config, environ) == (
        "NSM_DAIL_TIMEOUT is set, but not read here; did you mean NSM_DIAL_TIMEOUT?",
        "NSM_PPROF_ENABLED is set, but has no effect here: it is read upstream only",
        "NSM_QUITE_ANOTHER is set, but not read here; --help lists what is",
        "NSM_SRIOV_TOKENS_worker/10G is set, but has no effect here: it is read upstream only",
    )


def test_the_guard_of_a_test_is_handed_on_and_nothing_else_unasked() -> None:
    environ = {"NSM_LOOP_GUARD": "/tmp/guard", "NSM_NAME": "x", "HOME": "/root"}
    assert config.for_children(environ) == {"NSM_LOOP_GUARD": "/tmp/guard"}
    assert config.for_children({}) == {}
    also = ("NSM_DIAL_TIMEOUT", "NSM_ABSENT")
    assert config.for_children({**environ, "NSM_DIAL_TIMEOUT": "5s"}, also=also) == {
        "NSM_LOOP_GUARD": "/tmp/guard", "NSM_DIAL_TIMEOUT": "5s",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        (None, "127.0.0.1:0"),
        (":8082", ":0"),
        ("[::1]:8082", "[::1]:0"),
        ("10.0.0.1:0", "10.0.0.1:0"),
    ],
)
def test_children_serve_their_figures_at_ports_of_their_own(own: str | None, theirs: str) -> None:
    """At the program's none of them would start."""
    environ = {"PROMETHEUS": "true"} | ({"NSM_PROMETHEUS_LISTEN_ON": own} if own else {})
    found = config.for_children(environ)
    assert found == {"PROMETHEUS": "true", "NSM_PROMETHEUS_LISTEN_ON": theirs}
    assert config.parse(Config, found).prometheus_listen_on[1] == 0
    assert config.for_children({"NSM_PROMETHEUS_LISTEN_ON": ":8082"}) == {}
    wrong = {"PROMETHEUS": "true", "NSM_PROMETHEUS_LISTEN_ON": "8082"}
    assert config.for_children(wrong) == wrong, "not everywhere"


def test_check_shows_every_value_and_where_it_comes_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    environ = {"NSM_DIAL_TIMEOUT": "90s", "NSM_LABELS": "a:b", "NSM_DAIL": "x"}
    with pytest.raises(SystemExit) as end:
        config.read(Config, environ, ["--check"])
    told = capsys.readouterr()
    assert end.value.code == 0
    assert "NSM_DIAL_TIMEOUT=1m30s  # environment\n" in told.out
    assert "NSM_LABELS=a:b  # environment\n" in told.out
    assert "NSM_LISTEN_ON=unix:///run/door.sock  # default\n" in told.out
    assert "NSM_DAIL is set" in told.err


def test_what_check_prints_reads_back_as_the_same_settings() -> None:
    given = config.parse(Config, {"NSM_DIAL_TIMEOUT": "1h1ms", "NSM_LABELS": "a:b,c:d"})
    lines = [line.partition("  # ")[0] for line in config.resolved(given, {}).splitlines()]
    again = dict(line.split("=", 1) for line in lines if not line.startswith("NSM_PASSWORD"))
    assert config.parse(Config, again) == given


def test_help_lists_every_variable_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        config.read(Config, {}, ["--help"])
    told = capsys.readouterr().out
    assert end.value.code == 0
    assert "door: lets people in." in told
    assert "  NSM_DIAL_TIMEOUT  [750ms]\n      How long a dial may take, on both lines." in told
    assert "  NSM_LOG_LEVEL  [INFO]\n" in told
    assert "  SPIFFE_ENDPOINT_SOCKET  []\n" in told


@pytest.mark.parametrize(
    ("environ", "arguments", "said"),
    [
        ({"NSM_PORT": "x"}, [], "NSM_PORT is 'x'; expected a port"),
        ({}, ["--verbose"], "unknown argument '--verbose': settings come from NSM_* variables"),
    ],
)
def test_asking_wrongly_ends_with_2_and_a_sentence(
    environ: dict[str, str], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        config.read(Config, environ, arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_every_process_has_settings_with_a_sentence_each() -> None:
    seen = 0
    for process in ("nsmgr", "forwarder", "registry", "registry.proxy", "endpoints.responder"):
        if importlib.util.find_spec(f"{process}.config") is None:
            continue
        kind = importlib.import_module(f"{process}.config").Config
        config.parse(kind, {})
        without = [one.variable for one in config._settings(kind) if not one.help]
        assert without == [], f"{process}: no docstring below {without}"
        seen += 1
    assert seen


def test_only_this_module_reads_the_environment() -> None:
    packages = ("nsm", "nsmgr", "forwarder", "registry", "endpoints")
    found = subprocess.run(
        ["grep", "-rlE", r"os\.(environ|getenv)", "--include=*.py", *packages],
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == ["nsm/process/config.py"]
