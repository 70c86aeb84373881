"""A SPIFFE agent of stock grpcio, for our client: does what its stdin says, line by line.

{"answer": base64} answers every call, and every open one again, with these bytes;
{"status": name, "text": …} refuses; {"silent": true} does not answer; {"end": true}
ends open calls. Each call is printed with its metadata, each order heard with its number.
"""

import base64
import json
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc

from nsm.proto import workload_pb2_grpc
from nsm.proto.workload_pb2 import X509SVIDRequest, X509SVIDResponse

told = threading.Condition()
orders: list[dict[str, Any]] = [{"silent": True}]


class Agent(workload_pb2_grpc.SpiffeWorkloadAPIServicer):
    """Follows the newest order."""

    def FetchX509SVID(  # noqa: N802 - the protocol's name
        self, request: X509SVIDRequest, context: grpc.ServicerContext
    ) -> Iterator[X509SVIDResponse]:
        metadata = {k: v for k, v in context.invocation_metadata() if isinstance(v, str)}
        print(json.dumps({"metadata": metadata}), flush=True)
        followed = len(orders) - 1
        while context.is_active():
            order = orders[followed]
            if "status" in order:
                context.abort(grpc.StatusCode[order["status"]], order["text"])
            if "end" in order:
                return
            if "answer" in order:
                yield X509SVIDResponse.FromString(base64.b64decode(order["answer"]))
            followed += 1
            with told:
                while len(orders) <= followed and context.is_active():
                    told.wait(0.5)


def main() -> None:
    """Serve until stdin ends."""
    server = grpc.server(
        futures.ThreadPoolExecutor(8), options=[("grpc.max_send_message_length", -1)]
    )
    workload_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(Agent(), server)
    server.add_insecure_port(sys.argv[1])
    server.start()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        with told:
            orders.append(json.loads(line))
            told.notify_all()
        print(json.dumps({"heard": len(orders) - 1}), flush=True)
    server.stop(0)


if __name__ == "__main__":
    main()
