"""Where a connection is on its way: pure functions over its path (`wire.md` §3.1, §3.2).

A path names each hop a connection crosses, in order, and each hop's own id for
it. Stepping onto a hop makes that hop's id the connection's id; stepping off
gives the caller back the id and index it came with.
"""

from collections.abc import Mapping
from dataclasses import replace
from uuid import uuid4

from nsm.errors import InvalidError
from nsm.model import Connection, Path, Segment

MAX_SEGMENTS = 64  # 8 between domains today; a longer one is an attack or a loop
MAX_NAME = 512  # bytes of a segment's name or id; pod names have 253
MAX_TABLE = 64 * 1024  # characters of all labels, or of one segment's metrics; hops keep them


def enter(conn: Connection, name: str) -> tuple[Connection, int]:
    """Step onto the hop called name; return the connection there and the index to go back to.

    A hop met again keeps its segment, so that neither a refresh nor a process
    that is both server and client adds one. Raises InvalidError, with
    upstream's texts, on a path that does not lead here.
    """
    check(conn)
    segments = conn.segments
    if not segments:
        own = Segment(name, conn.id or str(uuid4()))
        return replace(conn, id=own.id, path=Path((own,))), 0
    index = conn.index
    if index < len(segments) and segments[index].name == name:
        return replace(conn, id=segments[index].id), index
    here = index + 1
    if here > len(segments):
        raise InvalidError(
            f"Path.Index+1=={here} should be less or equal len(Path.PathSegments)=={len(segments)}",
            hint="the index of the path points behind its last segment",
        )
    if segments[index].id != conn.id:
        raise InvalidError(
            f"Current PathSegment.Id=={segments[index].id!r} should be equal"
            f" Connection.Id=={conn.id!r}"
        )
    if here == len(segments):
        segments = (*segments, Segment(name, str(uuid4())))
    elif segments[here].name != name:
        # What follows belongs to the hop that was here before; it is cut when
        # the path ends, and until then tells nothing.
        stale = replace(segments[here], name=name, id=str(uuid4()))
        segments = (*segments[:here], stale, *segments[here + 1 :])
    entered = replace(conn, id=segments[here].id, path=_path(conn, segments, here))
    return entered, index


def leave(conn: Connection, index: int) -> Connection:
    """Step back to the hop that asked: its id and its index, all segments kept."""
    return replace(conn, id=conn.segments[index].id, path=_path(conn, conn.segments, index))


def end(conn: Connection) -> Connection:
    """Cut what lies behind the hop the connection is at: the path ends here."""
    return onward(conn, ())


def onward(conn: Connection, behind: tuple[Segment, ...]) -> Connection:
    """Lead the path on behind the hop the connection is at by these segments, and no others."""
    segments = (*conn.segments[: conn.index + 1], *behind)
    return replace(conn, path=_path(conn, segments, conn.index))


def called(conn: Connection, id_: str) -> Connection:
    """The connection under another id of the hop it is at."""
    if conn.id == id_:
        return conn
    return replace(_here(conn, replace(conn.segments[conn.index], id=id_)), id=id_)


def stamp(conn: Connection, index: int, token: str, expires: int | None) -> Connection:
    """Put a token and its expiry on the segment at index."""
    stamped = replace(conn.segments[index], token=token, expires=expires)
    segments = (*conn.segments[:index], stamped, *conn.segments[index + 1 :])
    return replace(conn, path=_path(conn, segments, conn.index))


TOOK = "took_ms"  # metric: the whole of the last request at this hop and behind it
FIND = "find_ms"  # metric: looking for an endpoint
KERNEL = "kernel_ms"  # metric: programming the kernel
BORDER = "border"  # metric: which way a domain's proxy let it pass
PROBE = "probe"  # metric: whether packets were seen to flow when the wire was made
HANDSHAKE = "handshake_ms"  # metric: until the far end of a WireGuard tunnel has proven its key


def took(conn: Connection, **seconds: float) -> Connection:
    """Write on the segment the connection is at how long parts of this request took.

    They are metrics of the path (`wire.md` §1.3), so the client sees each hop's.
    """
    here = conn.segments[conn.index]
    metrics = {key: f"{value * 1000:.3f}" for key, value in seconds.items()}
    return _here(conn, replace(here, metrics={**here.metrics, **metrics}))


def stages(conn: Connection, whole: float) -> dict[str, float]:
    """Where the milliseconds of a request went, from what each hop wrote on its segment.

    whole is what the client saw of it; conn is as returned. On a wire between two
    nodes the shares of both managers, and of both forwarders, are added up, and
    between two domains those of both proxies. A hop that wrote nothing counts with
    the hop before it. A handshake is there only where there was one.
    """
    shares = dict.fromkeys(("calling", "manager", "find", "forwarder", "kernel", "endpoint"), 0.0)
    before, role, proxies = whole, "calling", 0
    for position, segment in enumerate(conn.segments[1:], 1):
        proxies += BORDER in segment.metrics
        took = _milliseconds(segment, TOOK)
        if took is not None:
            shares[role] = shares.get(role, 0.0) + before - took
            last = position == len(conn.segments) - 1
            before, role = took, "endpoint" if last else _role(segment, position - proxies)
        for key, name in ((FIND, "find"), (KERNEL, "kernel"), (HANDSHAKE, "handshake")):
            part = _milliseconds(segment, key)
            if part is not None:
                shares[name] = shares.get(name, 0.0) + part
                shares["forwarder"] -= part
    shares[role] = shares.get(role, 0.0) + before
    return shares


def _role(segment: Segment, position: int) -> str:
    return "proxy" if BORDER in segment.metrics else ("forwarder", "manager")[position % 2]


def _milliseconds(segment: Segment, key: str) -> float | None:
    try:
        return float(segment.metrics[key])
    except (KeyError, ValueError):
        return None


def measured(conn: Connection, **metrics: str) -> Connection:
    """Add metrics to the segment the connection is at; the first writer of a key wins."""
    here = conn.segments[conn.index]
    return _here(conn, replace(here, metrics={**metrics, **here.metrics}))


def noted(conn: Connection, **metrics: str) -> Connection:
    """Write metrics on the segment the connection is at, over what they were."""
    here = conn.segments[conn.index]
    return _here(conn, replace(here, metrics={**here.metrics, **metrics}))


def _here(conn: Connection, here: Segment) -> Connection:
    segments = (*conn.segments[: conn.index], here, *conn.segments[conn.index + 1 :])
    return replace(conn, path=_path(conn, segments, conn.index))


def earliest_expiry(segments: tuple[Segment, ...]) -> int | None:
    """The first instant at which one of segments stops vouching; None if none says."""
    return min((s.expires for s in segments if s.expires is not None), default=None)


def check(conn: Connection) -> None:
    """Refuse a path nobody honest sends, before anything is done with it."""
    if len(conn.segments) > MAX_SEGMENTS:
        raise InvalidError(
            f"a path of {len(conn.segments)} segments; at most {MAX_SEGMENTS} are taken",
            hint="look for two hops that pass the request to one another",
        )
    _bounded("labels", conn.labels)
    _bounded("extra context", conn.context.extra if conn.context else {})
    _bounded("parameters of the mechanism", conn.mechanism.parameters if conn.mechanism else {})
    for position, segment in enumerate(conn.segments):
        _bounded(f"metrics of segment {position}", segment.metrics)
        if len(segment.name) > MAX_NAME or len(segment.id) > MAX_NAME:
            raise InvalidError(
                f"segment {position} of the path has a name or id of more than {MAX_NAME} bytes"
            )


def _bounded(what: str, table: Mapping[str, str]) -> None:
    size = sum(map(len, table)) + sum(map(len, table.values()))
    if size > MAX_TABLE:
        raise InvalidError(
            f"{size} characters of {what} in a connection; at most {MAX_TABLE} are taken",
            hint="send data through the wire, not beside it",
        )


def _path(conn: Connection, segments: tuple[Segment, ...], index: int) -> Path:
    unknown = conn.path.unknown if conn.path else b""
    return Path(segments, index, unknown)
