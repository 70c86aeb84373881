"""A wire with stock grpcio and protobuf; what is imported from nsm.proto is protoc's output.

stock_grpcio_client.py SERVICE INTERFACE MANAGER MANAGER_ID MANAGER_DNS CERT KEY BUNDLE

(echo nsm-1 unix:///run/nsm.io.sock spiffe://td/nsmgr nsmgr cert.pem key.pem bundle.pem)

grpcio hides the server's certificate, so the manager's two names are given: its SPIFFE id, for
which the token is made (signed by the openssl command), and the DNS name TLS looks for. Nor can
it send file descriptors: /proc names our namespace, and the kernel tells the manager who we are.
"""

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import grpc

from nsm.proto import networkservice_pb2, networkservice_pb2_grpc

SERVICE, INTERFACE, MANAGER, MANAGER_ID, MANAGER_DNS, CERT, KEY, BUNDLE = sys.argv[1:]


def openssl(*words, data=b""):
    return subprocess.run(["openssl", *words], input=data, stdout=-1, check=True).stdout


def metadata():
    """The token of one call: a JWT that says who we are, for whom it is, and until when."""
    names = openssl("x509", "-in", CERT, "-noout", "-ext", "subjectAltName").decode()
    me, until = names.split("URI:")[1].split(",")[0].strip(), int(time.time()) + 600
    claims = {"sub": me, "aud": [MANAGER_ID], "exp": until}
    parts = [json.dumps(part).encode() for part in ({"alg": "ES256", "typ": "JWT"}, claims)]
    text = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    der = openssl("dgst", "-sha256", "-sign", KEY, data=text)  # a SEQUENCE of r and s
    pair = (der[4 : 4 + der[3]], der[6 + der[3] :])
    raw = b"".join(int.from_bytes(one, "big").to_bytes(32, "big") for one in pair)
    token = (text + b"." + base64.urlsafe_b64encode(raw).rstrip(b"=")).decode()
    expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(until))
    return (("nsm-client-token", token), ("nsm-client-token-expires", expires))


request = networkservice_pb2.NetworkServiceRequest()
request.connection.id, request.connection.network_service = "stock-0", SERVICE
request.connection.path.path_segments.add(name="stock", id="stock-0")
here = {"name": INTERFACE, "inodeURL": f"file:///proc/{os.getpid()}/ns/net"}
request.mechanism_preferences.add(cls="LOCAL", type="KERNEL", parameters=here)
tls = grpc.ssl_channel_credentials(*(Path(one).read_bytes() for one in (BUNDLE, KEY, CERT)))
name = (("grpc.ssl_target_name_override", MANAGER_DNS),)
stub = networkservice_pb2_grpc.NetworkServiceStub(grpc.secure_channel(MANAGER, tls, name))
try:
    while True:
        request.connection.CopyFrom(stub.Request(request, metadata=metadata(), timeout=15))
        print(INTERFACE, *request.connection.context.ip_context.src_ip_addrs, flush=True)
        time.sleep(120)  # a refresh is due after a fifth of the tokens' ten minutes
except KeyboardInterrupt:
    stub.Close(request.connection, metadata=metadata(), timeout=15)
