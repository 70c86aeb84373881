"""Stock grpcio with a channel of ours: nothing but a URL, everything else from the environment."""

import sys

from tests.e2e.programs.mesh import DOMAIN, mesh

ASKING = """
import asyncio, sys
import grpc, nsm.grpcio
from nsm.proto import registry_pb2 as pb, registry_pb2_grpc as registry

async def main(url):
    async with nsm.grpcio.channel(url) as channel:
        assert isinstance(channel, grpc.aio.Channel)
        stub = registry.NetworkServiceEndpointRegistryStub(channel)
        query = pb.NetworkServiceEndpointQuery()
        found = [one.network_service_endpoint.name async for one in stub.Find(query, timeout=5)]
        print("found", *found)
        stub = registry.NetworkServiceRegistryStub(channel)
        path = (("path", '{"Index":0,"PathSegments":null}'),)
        made = await stub.Register(pb.NetworkService(name="mine"), metadata=path, timeout=5)
        print("owner", made.path_ids[0])

asyncio.run(main(sys.argv[1]))
"""


async def test_a_url_is_enough(tmp_path):
    async with mesh(tmp_path, {}) as node:
        asking = await node.start(sys.executable, "-c", ASKING, node.manager, kind="other")
        assert await asking.ended() == 0, asking.log
        assert "found forwarder-1" in asking.log
        assert f"owner spiffe://{DOMAIN}/other" in asking.log
