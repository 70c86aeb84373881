"""What a process writes about itself: JSON for machines, text for a terminal.

One event a line, on stderr. Whoever logs uses `structlog.get_logger()`; this
module decides once how it looks, for that and for the standard library's
`logging`, which our dependencies use. Nothing secret passes: whatever looks
like a token or a private key is cut out of every value, exceptions included.
"""

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from nsm.process.forms import LogLevel

LEVELS: Mapping[LogLevel, int] = {
    "TRACE": logging.NOTSET,  # upstream's name for everything
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARN": logging.WARNING,
    "ERROR": logging.ERROR,
}
LONGEST = 8192  # characters of one value, because peers choose some of them

# Three parts of base64url of which the first is a JSON object: a signed token.
_TOKEN = re.compile(r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*")
_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_QUIET = ("hpack", "h2", "asyncio", "pyroute2")  # their DEBUG drowns ours


def configure(level: LogLevel, *, process: str, name: str, colors: bool | None = None) -> None:
    """Write events of at least this level to stderr, each with the process's kind and name.

    colors: None is "where stderr is a terminal", which also decides between text and JSON.
    """
    terminal = sys.stderr.isatty()
    shape: tuple[Processor, Processor]
    if terminal:
        shape = (
            structlog.processors.TimeStamper("%H:%M:%S.%f", utc=False),
            structlog.dev.ConsoleRenderer(
                colors=terminal if colors is None else colors,
                exception_formatter=structlog.dev.plain_traceback,
            ),
        )
    else:
        shape = (
            structlog.processors.TimeStamper("iso"),
            structlog.processors.JSONRenderer(ensure_ascii=False),
        )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _whose(process, name),
            structlog.processors.format_exc_info,  # before the redaction, as text without locals
            _redact,
            *shape,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,  # so that a signal can change the level
    )
    root = logging.getLogger()
    root.handlers[:] = [_Forward()]
    root.setLevel(LEVELS[level])
    for library in _QUIET:
        logging.getLogger(library).setLevel(max(LEVELS[level], logging.INFO))


def set_level(level: LogLevel) -> None:
    """Change what is worth a line, from the next line on."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]))
    logging.getLogger().setLevel(LEVELS[level])


class _Forward(logging.Handler):
    """Hands the standard library's records to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = structlog.get_logger()
        levels = ((40, logger.error), (30, logger.warning), (20, logger.info))
        write = next((write for least, write in levels if record.levelno >= least), logger.debug)
        write(record.getMessage(), logger=record.name, exc_info=record.exc_info or None)


def _whose(process: str, name: str) -> Processor:
    def add(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        event.setdefault("process", process)
        event.setdefault("name", name)
        return event

    return add


def _redact(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    trace = event.pop("exception", None)
    clean = {str(key): redacted(value) for key, value in event.items()}
    if isinstance(trace, str):
        lines = _hidden(trace)[-4 * LONGEST :].split("\n")
        clean["exception"] = "\n".join(map(_one_line, lines))
    return clean


def _hidden(text: str) -> str:
    return _KEY.sub("<private key>", _TOKEN.sub("<token>", text))


def _one_line(text: str) -> str:
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def _clean(text: str) -> str:
    text = _hidden(text)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}… ({len(text)} characters)"
    return _one_line(text)  # so that nobody else can write a line of ours


def redacted(value: Any, depth: int = 6) -> Any:
    """The value without tokens and private keys, and with a bound on its length.

    What is neither text nor a plain container becomes its repr, which cannot hide either.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if depth == 0:
        return "…"
    if isinstance(value, Mapping):
        return {_clean(str(k)): redacted(v, depth - 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redacted(one, depth - 1) for one in value]
    return _clean(value if isinstance(value, str) else repr(value))
