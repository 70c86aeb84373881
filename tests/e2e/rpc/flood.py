"""A stock grpcio client, a program of its own, that sends one message of 200 MB."""

import json
import sys

import grpc

from tests.e2e.rpc.echo import stock_options, target


def main() -> None:
    """Read url and certificates from stdin; print the status that came."""
    told = json.load(sys.stdin)
    credentials = grpc.ssl_channel_credentials(
        told["roots"].encode(), told["key"].encode(), told["chain"].encode()
    )
    with grpc.secure_channel(target(told["url"]), credentials, stock_options()) as channel:
        call = channel.unary_unary("/networkservice.NetworkService/Request")
        try:
            call(b"\x0a" * 200_000_000, timeout=60)
        except grpc.RpcError as error:
            print(error.code().name, error.details())


if __name__ == "__main__":
    main()
