"""A server as a program of its own: certificates on stdin, URLs as arguments."""

import asyncio
import sys

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from nsm.identity.source import HeldIdentity, Identity, Svid
from nsm.identity.verify import leaf_id
from nsm.rpc.server import serve
from tests.e2e.rpc.echo import Echo


async def main() -> None:
    """Serve until killed; say so when it begins."""
    told = sys.stdin.buffer.read()
    key = load_pem_private_key(told, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    leaf, root = x509.load_pem_x509_certificates(told[told.index(b"-----BEGIN CERT") :])
    own = leaf_id(leaf)
    source = HeldIdentity(Identity(Svid(own, (leaf,), key), {own.trust_domain: (root,)}))
    async with serve(sys.argv[1:], [Echo()], source):
        print("serving", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
