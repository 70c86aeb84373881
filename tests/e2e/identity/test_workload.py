"""Our Workload API client against an agent of stock grpcio."""

import asyncio
import base64
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from nsm.errors import DeniedError, InvalidError, UnavailableError
from nsm.identity import workload
from nsm.identity.authority import Authority
from nsm.identity.source import Svid
from nsm.identity.spiffe import SpiffeId
from nsm.identity.workload import workload_source
from nsm.proto.workload_pb2 import X509SVID, X509SVIDResponse
from tests.e2e.identity.running import AGENT, Running, running
from tests.support.wait import until
from tests.unit.identity.forge import unreadable

DOMAIN = Authority.create("td.example")
OTHER = Authority.create("other.example")
ME = SpiffeId.parse("spiffe://td.example/me")


def der(certificates: Sequence[Any]) -> bytes:
    return b"".join(c.public_bytes(serialization.Encoding.DER) for c in certificates)


def message(svid: Svid, **change: Any) -> X509SVID:
    key = svid.key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    whole: dict[str, Any] = {
        "spiffe_id": str(svid.id),
        "x509_svid": der(svid.chain),
        "x509_svid_key": key,
        "bundle": der(DOMAIN.certificates),
    }
    return X509SVID(**{**whole, **change})


def answer(*svids: X509SVID, federated: Mapping[str, bytes] | None = None) -> str:
    whole = X509SVIDResponse(svids=svids, federated_bundles=federated or {})
    return base64.b64encode(whole.SerializeToString()).decode()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"unix://{tmp_path}/agent.sock"


@pytest.fixture
async def agent(url: str) -> AsyncIterator[Running]:
    async with running(sys.executable, AGENT, url) as process:
        await until(lambda: process.said, "the agent", bar=5)
        yield process


def calls(agent: Running) -> list[dict[str, str]]:
    """The metadata of each call so far."""
    return [said["metadata"] for said in agent.said if "metadata" in said]


async def heard(agent: Running, number: int) -> None:
    """Wait until the agent follows so many orders."""
    await until(lambda: {"heard": number} in agent.said, "the agent to hear", bar=5)


async def test_the_first_svid_is_ours_and_the_header_is_sent(url: str, agent: Running) -> None:
    first, second = DOMAIN.issue(ME), DOMAIN.issue(SpiffeId.parse("spiffe://td.example/second"))
    federated = {"spiffe://other.example": der(OTHER.certificates)}
    agent.tell(answer=answer(message(first, hint="h"), message(second), federated=federated))
    async with workload_source(url, patience=10) as source:
        identity = source.identity
    assert identity.svid.chain == first.chain
    assert identity.svid.hint == "h"
    assert identity.svid.key.private_numbers() == first.key.private_numbers()
    assert identity.bundles == {
        "td.example": DOMAIN.certificates,
        "other.example": OTHER.certificates,
    }
    assert calls(agent)[0]["workload.spiffe.io"] == "true"


async def test_rotation_arrives_on_the_same_stream(url: str, agent: Running) -> None:
    agent.tell(answer=answer(message(DOMAIN.issue(ME))))
    async with workload_source(url, patience=10) as source:
        for _ in range(3):
            seen, renewed = source.identity, DOMAIN.issue(ME)
            agent.tell(answer=answer(message(renewed)))
            assert (await asyncio.wait_for(source.changed(seen), 5)).svid.chain == renewed.chain
    assert len(calls(agent)) == 1


async def test_an_intermediate_comes_along(url: str, agent: Running) -> None:
    svid = DOMAIN.issue(ME)
    chain = (*svid.chain, *DOMAIN.certificates)
    agent.tell(answer=answer(message(svid, x509_svid=der(chain))))
    async with workload_source(url, patience=10) as source:
        assert source.identity.svid.chain == chain


async def test_an_agent_that_goes_and_comes_back_is_found_again(url: str, agent: Running) -> None:
    first, second = DOMAIN.issue(ME), DOMAIN.issue(ME)
    agent.tell(answer=answer(message(first)))
    async with workload_source(url, patience=10) as source:
        seen = source.identity
        agent.process.kill()
        await agent.process.wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(source.changed(seen), 0.3)
        assert source.identity is seen
        async with running(sys.executable, AGENT, url) as again:
            again.tell(answer=answer(message(second)))
            found = await asyncio.wait_for(source.changed(seen), 20)
    assert found.svid.chain == second.chain


async def test_a_stream_that_ends_is_opened_again(url: str, agent: Running) -> None:
    agent.tell(answer=answer(message(DOMAIN.issue(ME))))
    async with workload_source(url, patience=10) as source:
        seen, renewed = source.identity, DOMAIN.issue(ME)
        agent.tell(end=True)
        agent.tell(answer=answer(message(renewed)))
        assert (await asyncio.wait_for(source.changed(seen), 5)).svid.chain == renewed.chain


async def test_pauses_between_attempts_grow(url: str, agent: Running) -> None:
    agent.tell(status="UNAVAILABLE", text="not yet")
    with pytest.raises(UnavailableError, match="not yet"):
        async with workload_source(url, patience=3):
            pass
    # without growth it would have been 40 to 80 calls
    assert 4 <= len(calls(agent)) <= 9


async def test_nobody_registered_is_a_denial_that_says_so(url: str, agent: Running) -> None:
    agent.tell(status="PERMISSION_DENIED", text="no identity issued")
    with pytest.raises(DeniedError) as refused:
        async with workload_source(url, patience=0.5):
            pass
    assert "PERMISSION_DENIED: no identity issued" in str(refused.value)
    assert "register this process" in str(refused.value)


async def test_an_identity_granted_late_is_taken(url: str, agent: Running) -> None:
    agent.tell(status="PERMISSION_DENIED", text="no identity issued")

    async def grant() -> None:
        await until(lambda: len(calls(agent)) > 1, "two refusals", bar=2)
        agent.tell(answer=answer(message(DOMAIN.issue(ME))))

    async with asyncio.TaskGroup() as group:
        group.create_task(grant())
        async with workload_source(url, patience=10) as source:
            assert source.identity.svid.id == ME


async def test_an_agent_that_says_nothing_is_waited_for_no_longer_than_asked(
    url: str, agent: Running
) -> None:
    start = asyncio.get_running_loop().time()
    with pytest.raises(UnavailableError, match="did not answer"):
        async with workload_source(url, patience=0.5):
            pass
    assert asyncio.get_running_loop().time() - start < 2


async def test_no_socket_is_a_sentence_with_the_variable(url: str) -> None:
    with pytest.raises(UnavailableError) as refused:
        async with workload_source(url, patience=0.2):
            pass
    assert url in str(refused.value)
    assert "SPIFFE_ENDPOINT_SOCKET" in str(refused.value)
    assert "No such file" in str(refused.value)


@pytest.mark.parametrize(
    "bad", ["", "/run/x", "tcp://127.0.0.1:1", "unix://host/x", "unix:x", "unix:///" + "x" * 200]
)
async def test_a_bad_url_is_refused_at_once(bad: str) -> None:
    with pytest.raises(InvalidError, match="unix"):
        async with workload_source(bad, patience=10):
            pass


def broken_answers() -> dict[str, tuple[str, str]]:
    svid, stranger = DOMAIN.issue(ME), DOMAIN.issue(ME)
    foreign = {"spiffe://other.example": der(OTHER.issue(SpiffeId("other.example", "/x")).chain)}
    strange = {"other.example": der(OTHER.certificates)}
    many = {f"spiffe://d{n}.example": b"" for n in range(workload.MAX_DOMAINS + 1)}
    key = message(stranger).x509_svid_key
    return {
        "no svid": (answer(), "no SVID"),
        "another id": (answer(message(svid, spiffe_id="spiffe://td.example/x")), "its certificate"),
        "another key": (answer(message(svid, x509_svid_key=key)), "not that of the certificate"),
        "no key": (answer(message(svid, x509_svid_key=b"")), "no unencrypted private key"),
        "no certificate": (answer(message(svid, x509_svid=b"")), "has no certificate"),
        "nonsense": (answer(message(svid, x509_svid=b"\x30\x80" * 99)), "no concatenated DER"),
        "no bundle": (answer(message(svid, bundle=b"")), "has no certificate"),
        "bundle of workloads": (answer(message(svid, bundle=der(svid.chain))), "no authority's"),
        "foreign workloads": (answer(message(svid), federated=foreign), "no authority's"),
        "strange domain": (answer(message(svid), federated=strange), "no SPIFFE id"),
        "unheard version": (
            answer(message(svid), federated={"spiffe://x.example": unreadable("version")}),
            "cannot be read",
        ),
        "many domains": (answer(message(svid), federated=many), "1025 federated bundles"),
        "huge": (answer(message(svid, hint="x" * 2**25)), "at most 16777216 are read"),
    }


@pytest.mark.parametrize(
    "which",
    [
        pytest.param(which, marks=() if which in ("nonsense", "huge") else pytest.mark.long)
        for which in broken_answers()
    ],
)
async def test_a_broken_answer_is_refused_and_leaves_the_last_good_identity(
    url: str, agent: Running, which: str
) -> None:
    broken, words = broken_answers()[which]
    agent.tell(answer=answer(message(DOMAIN.issue(ME))))
    async with workload_source(url, patience=10) as source:
        seen = source.identity
        before = len(calls(agent))
        agent.tell(answer=broken)
        await until(lambda: len(calls(agent)) > before, "the client to come back", bar=2)
        assert source.identity is seen
        renewed = DOMAIN.issue(ME)
        agent.tell(answer=answer(message(renewed)))
        assert (await asyncio.wait_for(source.changed(seen), 10)).svid.chain == renewed.chain
    agent.tell(answer=broken)
    await heard(agent, 4)
    with pytest.raises(UnavailableError) as refused:
        async with workload_source(url, patience=6 if which == "huge" else 0.6):
            pass
    assert words in str(refused.value)
    assert "PRIVATE" not in str(refused.value)
