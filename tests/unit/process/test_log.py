"""Logs are lines of JSON or text, and hold no secrets, whatever is thrown at them."""

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator

import jwt
import pytest
import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from nsm.errors import Code
from nsm.identity.spiffe import SpiffeId
from nsm.process import log as logs
from nsm.process.calls import log_call
from nsm.process.forms import LogLevel
from nsm.rpc.server import Call

KEY = ec.generate_private_key(ec.SECP256R1())
TOKEN = jwt.encode({"sub": "spiffe://east.test/nsc", "aud": ["x"], "exp": 1}, KEY, "ES256")
PEM = KEY.private_bytes(
    serialization.Encoding.PEM,
    serialization.PrivateFormat.PKCS8,
    serialization.NoEncryption(),
).decode()


def fail(why: str, cause: Exception) -> None:
    raise RuntimeError(why) from cause


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., io.StringIO]]:
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level

    def start(stream: io.StringIO | None = None, level: LogLevel = "INFO") -> io.StringIO:
        stream = io.StringIO() if stream is None else stream
        monkeypatch.setattr(sys, "stderr", stream)
        logs.configure(level, process="nsmgr", name="east-1")
        return stream

    yield start
    structlog.reset_defaults()
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)


Start = Callable[..., io.StringIO]


def test_a_line_is_one_json_object_that_says_whose_it_is(written: Start) -> None:
    out = written()
    structlog.get_logger().info("request", connection="c1", ms=12.5)
    line = json.loads(out.getvalue())
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "request",
        "level": "info",
        "process": "nsmgr",
        "name": "east-1",
        "connection": "c1",
        "ms": 12.5,
    }


def test_on_a_terminal_it_is_text(written: Start) -> None:
    out = written(Terminal())
    structlog.get_logger().info("request", connection="c1")
    assert "request" in out.getvalue()
    assert "{" not in out.getvalue()


def test_the_level_can_change_while_it_runs(written: Start) -> None:
    out = written(level="WARN")
    log = structlog.get_logger()
    log.info("unheard")
    logs.set_level("TRACE")
    log.debug("heard")
    logging.getLogger("grpclib").debug("heard too")
    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == [
        "heard",
        "heard too",
    ]


def test_what_dependencies_log_comes_out_in_the_same_form(written: Start) -> None:
    out = written()
    logging.getLogger("grpclib.server").warning("lost %s", "a stream")
    line = json.loads(out.getvalue())
    assert (line["event"], line["logger"], line["level"]) == (
        "lost a stream",
        "grpclib.server",
        "warning",
    )


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("secret", [TOKEN, PEM], ids=["token", "key"])
def test_no_token_or_key_reaches_a_log_by_any_way(
    written: Start, stream: type[io.StringIO], secret: str
) -> None:
    out = written(stream())
    log = structlog.get_logger()

    class Careless:
        def __repr__(self) -> str:
            return f"Careless({secret})"

    log.info(" ".join(("got", secret)))
    log.info("x", token=secret, metadata={"nsm-client-token": secret, secret: [secret, {secret}]})
    log.info("x", careless=Careless(), raw=secret.encode())
    logging.getLogger("grpclib").error("bad metadata: %r", {"t": secret})
    inner = ValueError(secret)
    inner.add_note(f"and {secret}")
    try:
        fail(f"around {secret}", inner)
    except RuntimeError:
        log.exception("failed")
        logging.getLogger("h2").exception("failed")
    written_text = out.getvalue()
    assert "failed" in written_text
    for part in secret.strip().replace("\n", ".").split("."):
        if not part.startswith("-----"):
            assert part not in written_text


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_peer_cannot_write_a_line_of_its_own(written: Start, stream: type[io.StringIO]) -> None:
    out = written(stream())
    structlog.get_logger().info("request", service='vpn\n{"event": "admitted"}\x1b[2J\u2028x')
    assert out.getvalue().count("\n") == 1
    assert "\x1b[2J" not in out.getvalue()


def test_a_value_is_bounded(written: Start) -> None:
    out = written()
    structlog.get_logger().info("request", service="x" * 1_000_000)
    assert len(out.getvalue()) < 10_000


@given(st.recursive(st.text() | st.binary() | st.integers() | st.none(), st.lists, max_leaves=8))
def test_whatever_is_logged_can_be_written(value: object) -> None:
    json.dumps(logs.redacted(value)).encode()


@pytest.mark.parametrize(
    ("code", "level"),
    [(Code.OK, "info"), (Code.CANCELLED, "info"), (Code.UNAVAILABLE, "warning")],
)
def test_a_call_its_caller_wants_no_more_of_is_no_warning(
    written: Start, code: Code, level: str
) -> None:
    """Upstream's managers end a watch, and its clients a monitor stream, at every refresh."""
    out = written()
    caller = SpiffeId.parse("spiffe://td.test/nsc")
    log_call(Call("/connection.MonitorConnection/MonitorConnections", caller, code, 1.0))
    assert json.loads(out.getvalue())["level"] == level
