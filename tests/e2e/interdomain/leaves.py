"""What processes show as their certificates: of the keys that sign their tokens.

    python tests/e2e/interdomain/leaves.py HOST PORT [HOST PORT …]

prints, in PEM, those of whoever listens there.
"""

import socket
import ssl
import sys


def shown(at: socket.socket) -> str:
    """The certificate of whoever is at the other end; what proves it is what it has signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with at, context.wrap_socket(at) as secured:
        leaf = secured.getpeercert(binary_form=True)
    assert leaf, "no certificate"
    return ssl.DER_cert_to_PEM_cert(leaf)


def shown_at(path: str) -> str:
    """The same of a unix socket."""
    with socket.socket(socket.AF_UNIX) as at:
        at.connect(path)
        return shown(at)


if __name__ == "__main__":
    for host, port in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        sys.stdout.write(shown(socket.create_connection((host, int(port)), 5)))
