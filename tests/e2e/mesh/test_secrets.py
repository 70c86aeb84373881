"""What a process writes down of a request holds no token and no key, be it at level TRACE.

Each process of this folder's mesh logs at that level, and all logs are scanned when
the mesh goes down. Here the tokens are known, so their signatures are looked for too.
"""

import json

from tests.e2e.mesh.conftest import Asker, Mesh, asked
from tests.support import secrets


def tokens_of(answer: dict[str, object]) -> list[str]:
    """The tokens on an answer's path, of every hop."""
    return [
        segment["token"]
        for segment in answer["answer"]["path"]["pathSegments"]  # type: ignore[index]
    ]


def test_no_log_of_any_process_holds_a_token_or_key_at_trace(mesh: Mesh, alice: Asker, bob: Asker):
    used = [who.have("mint")["token"] for who in (alice, bob)]
    message = asked(alice)
    made = alice.have("call", method="Request", message=message, token={"text": used[0]})
    used += tokens_of(made)
    assert len(used) == 6, "four hops"
    tampered = used[0][:-8] + "AAAAAAAA"
    refused = [
        *({"text": text} for text in (used[1], tampered, f"{used[0]}.more", f"Bearer {used[0]}")),
        {"exp": -60},
        {"aud": ["spiffe://home.test/somebody/else"]},
    ]
    for token in refused:
        answer = alice.ask("call", method="Request", message=asked(alice, "nothing"), token=token)
        assert answer["code"] == "PERMISSION_DENIED", (token, answer)
        assert not secrets.told_in(answer["text"]), answer
    expired = alice.have("mint", token={"exp": -60})["token"]
    answer = alice.ask("call", method="Request", message=asked(alice), token={"text": expired})
    assert answer["code"] == "PERMISSION_DENIED", answer
    closing = {**made["answer"], "path": {**made["answer"]["path"], "index": 0}}
    alice.have("call", method="Close", message=closing)
    registering = {"name": "secretive", "url": "tcp://198.18.0.9:1", "networkServiceNames": ["x"]}
    for how in ({}, {"token": {"text": tampered}}):
        path = json.dumps({"Index": 0, "PathSegments": None})
        alice.ask("call", method="RegisterEndpoint", message=registering,
                  metadata=[["path", path]], **how)  # fmt: skip
    signatures = [token.rpartition(".")[2] for token in (*used, expired)]
    logs = mesh.logs()
    processes = {log.name for log in logs}
    for kind in ("issuer", "registry", "nsmgr", "forwarder", "responder", "nsc"):
        assert f"node-1.{kind}" in processes
    lines = [line for log in logs for line in log.read_text().splitlines()]
    told = [one.environment.get("NSM_LOG_LEVEL") for one in mesh.plan.processes]
    assert told == ["TRACE"] * len(told)
    assert [line for line in lines if made["answer"]["path"]["pathSegments"][1]["id"] in line]
    assert not secrets.told_by(logs)
    assert not [line for line in lines for one in signatures if one in line]
