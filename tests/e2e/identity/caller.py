"""A workload: asks the Workload API who it is, with the public `spiffe` package.

Becomes another user, group, cgroup or namespace first, as its arguments say; then
prints what it was told, one JSON object a line, until its stdin ends.
"""

import argparse
import ctypes
import json
import os
import socket
import sys
from typing import Any

import grpc
from spiffe import SpiffeId, TrustDomain, WorkloadApiClient, X509Svid
from spiffe.errors import PySpiffeError


def say(**what: Any) -> None:
    """Print one line."""
    print(json.dumps(what), flush=True)


def shown(svid: X509Svid) -> dict[str, Any]:
    """What a test may see of an SVID: everything but the key."""
    return {
        "id": str(svid.spiffe_id),
        "serial": str(svid.leaf.serial_number),
        "end": svid.leaf.not_valid_after_utc.timestamp(),
        "begin": svid.leaf.not_valid_before_utc.timestamp(),
    }


def bundles(context: Any) -> dict[str, int]:
    """Trust domain -> number of authorities."""
    return {str(bundle.trust_domain): len(bundle.x509_authorities) for bundle in context.bundles}


def fetch(socket_url: str) -> None:
    """Ask once for everything."""
    with WorkloadApiClient(socket_url, default_timeout=10) as client:
        try:
            context = client.fetch_x509_context()
            default = client.fetch_x509_svid()
        except PySpiffeError as refused:
            say(refused=str(refused))
            return
        say(
            svids=[shown(svid) for svid in context.x509_svids],
            default=str(default.spiffe_id),
            bundles=bundles(context.x509_bundle_set),
            all_bundles=bundles(client.fetch_x509_bundles()),
        )


def jwt(socket_url: str) -> None:
    """Ask for what the issuer does not offer."""
    with WorkloadApiClient(socket_url, default_timeout=10) as client:
        for call in (
            lambda: client.fetch_jwt_svid({"x"}),
            client.fetch_jwt_bundles,
            lambda: client.validate_jwt_svid("x", "y"),
        ):
            try:
                call()
            except PySpiffeError as refused:
                say(refused=str(refused))


def stream(socket_url: str) -> None:
    """Print each update."""

    def took(context: Any) -> None:
        say(svid=shown(context.default_svid), bundles=bundles(context.x509_bundle_set))

    with WorkloadApiClient(socket_url) as client:
        handler = client.stream_x509_contexts(
            took, lambda error: say(ended=str(error)), retry_connect=False
        )
        sys.stdin.read()
        handler.cancel()


def raw(socket_url: str) -> None:
    """Call without the metadata, with a huge request, with too many streams."""
    channel = grpc.insecure_channel(socket_url, [("grpc.max_send_message_length", -1)])
    call = channel.unary_stream("/SpiffeWorkloadAPI/FetchX509SVID")
    header = (("workload.spiffe.io", "true"),)
    try:
        next(call(b"", timeout=10))
    except grpc.RpcError as refused:
        say(code=refused.code().name, text=refused.details())
    try:
        say(
            answered=len(
                next(call(b"\x0a\xff\xff\xff\x1f" + b"x" * 2**26, timeout=3, metadata=header))
            )
        )
    except grpc.RpcError as refused:
        say(code=refused.code().name)
    streams = [call(b"", metadata=header) for _ in range(65)]
    codes = []
    for each in streams:
        try:
            next(each)
        except grpc.RpcError as refused:
            codes.append(refused.code().name)
    say(codes=codes)
    channel.close()


def pass_on(socket_url: str) -> None:
    """Connect, leave the connection to a child, and end: nobody knows who the child is."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(socket_url.removeprefix("unix://"))
    if os.fork():
        os._exit(0)
    import h2.connection
    import h2.events

    while os.getppid() == int(os.environ["PARENT"]):
        pass
    h2c = h2.connection.H2Connection()
    h2c.initiate_connection()
    h2c.send_headers(
        1,
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/SpiffeWorkloadAPI/FetchX509SVID"),
            (":authority", "x"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("workload.spiffe.io", "true"),
        ],
    )
    h2c.send_data(1, b"\0\0\0\0\0", end_stream=True)
    connection.sendall(h2c.data_to_send())
    while True:
        for event in h2c.receive_data(connection.recv(65536)):
            if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                headers = {k.decode(): v.decode() for k, v in event.headers}
                if "grpc-status" in headers:
                    say(status=headers["grpc-status"], text=headers["grpc-message"])
                    os._exit(0)
            elif isinstance(event, h2.events.DataReceived):
                say(answered=len(event.data))
                os._exit(0)
        connection.sendall(h2c.data_to_send())


def main() -> None:
    """Become who the arguments say, and ask."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["fetch", "jwt", "stream", "raw", "pass_on"])
    parser.add_argument("socket_url")
    parser.add_argument("--uid", type=int)
    parser.add_argument("--gid", type=int)
    parser.add_argument("--cgroup", help="a directory of a cgroup hierarchy")
    parser.add_argument("--netns", help="a namespace's file, or 'new'")
    arguments = parser.parse_args()
    libc = ctypes.CDLL(None, use_errno=True)
    if arguments.netns == "new":
        assert libc.unshare(0x40000000) == 0, os.strerror(ctypes.get_errno())
    elif arguments.netns:
        fd = os.open(arguments.netns, os.O_RDONLY)
        assert libc.setns(fd, 0x40000000) == 0, os.strerror(ctypes.get_errno())
        os.close(fd)
    if arguments.cgroup:
        with open(f"{arguments.cgroup}/cgroup.procs", "w") as procs:
            procs.write(str(os.getpid()))
    SpiffeId("spiffe://a/b"), TrustDomain("a")  # nothing is imported any more after this
    if arguments.gid is not None:
        os.setgroups([])
        os.setgid(arguments.gid)
    if arguments.uid is not None:
        os.setuid(arguments.uid)
    os.environ["PARENT"] = str(os.getpid())
    globals()[arguments.what](arguments.socket_url)


if __name__ == "__main__":
    main()
