"""What goes wrong ends with a status and one sentence, and changes nothing.

Each sentence says what, whose, where and what to do. That nothing changed is what the
fixtures of this folder ask the kernel after every test.
"""

import os
import signal
import subprocess
import time

import pytest

from labs.alive import Mark, started, stop
from nsm.identity.authority import Authority
from nsm.model import SECOND
from tests.e2e.mesh.conftest import DOMAIN, OWN, Mesh, Started, asked, identity, is_sentence
from tests.support.spaces import workload
from tests.support.wait import until, write

HOUR = 3600 * SECOND
# --- who is asked for ------------------------------------------------------------------------


def test_a_service_nobody_registered_is_not_found(alice):
    answer = alice.ask("connect", url="kernel://nothing/nsm-1")
    is_sentence(answer, "NOT_FOUND", "network service nothing", "not found", "`nsmctl services`")


def test_a_service_without_an_endpoint_is_told_from_one_that_is_unknown(alice):
    alice.have("call", method="RegisterService", message={"name": "lonely", "payload": "ETHERNET"},
               metadata=[["path", "{}"]])  # fmt: skip
    answer = alice.ask("connect", url="kernel://lonely/nsm-1")
    is_sentence(answer, "NOT_FOUND", "nobody serves 'lonely'", "start an endpoint")
    alice.have("call", method="UnregisterService", message={"name": "lonely"},
               metadata=[["path", "{}"]])  # fmt: skip


def test_an_endpoint_that_is_asked_for_by_name_and_not_there_is_named(alice, serving):
    serving.have("serve", name="picky", offers=["picky"])
    answer = alice.ask(
        "call", method="Request", message=asked(alice, "picky", networkServiceEndpointName="nobody")
    )
    serving.have("end", name="picky")
    is_sentence(answer, "NOT_FOUND", "endpoint nobody not found", "is it running?")


def test_labels_that_fit_no_endpoint_are_refused_with_who_was_there(alice, serving):
    routes = [{"destinationSelector": {"tier": "{{.tier}}"}}]
    service = {"name": "tiers", "payload": "ETHERNET", "matches": [{"routes": routes}]}
    register = {"metadata": [["path", "{}"]], "message": service}
    alice.have("call", method="RegisterService", **register)
    serving.have(
        "serve", name="cellar", offers=["tiers"], labels={"tier": "low"}, register_service=False
    )
    answer = alice.ask("connect", url="kernel://tiers/nsm-1?tier=high")
    is_sentence(
        answer,
        "NOT_FOUND",
        "none of the 1 endpoints of 'tiers' (cellar)",
        "'tier': 'high'",
        "compare them with the service's matches",
    )
    fits = alice.have("connect", url="kernel://tiers/nsm-1?tier=low")
    assert [hop["name"] for hop in fits["path"]][-1] == "cellar"
    alice.have("close", wire=fits["wire"])
    serving.have("end", name="cellar")
    alice.have("call", method="UnregisterService", **register)


@pytest.fixture(scope="module")
def without_forwarder(mesh: Mesh) -> str:
    """A node whose forwarder was stopped, and how long that took to be true for its manager."""
    pid = mesh.pid("node-3/forwarder")
    assert stop([Mark(pid, started(pid))], 5.0) == 0
    return "node-3"


def test_a_node_without_a_forwarder_says_so(without_forwarder, mesh):
    answer = mesh.askers["carol"].ask("connect", url="kernel://echo/nsm-1")
    is_sentence(answer, "UNAVAILABLE", "forwarder forwarder-node-3", "is its process running?")


def test_a_manager_that_no_forwarder_ever_met_says_so(mesh, tmp_path):
    door = f"unix://{tmp_path}/nsm.io.sock"
    own = {"NSM_NAME": "lonely", "NSM_LISTEN_ON": door, "NSM_STORE": ""}
    lonely = Started(mesh, "nsmgr", "node-3/nsmgr", **own)
    try:
        lonely.says("ready")
        answer = mesh.askers["carol"].ask("connect", url="kernel://echo/nsm-1", manager=door)
        is_sentence(answer, "NOT_FOUND", "no candidates found", "0 forwarders", "start a forwarder")
    finally:
        assert lonely.stopped() == 0


def test_an_endpoint_that_died_is_named(alice, serving):
    serving.have("serve", name="ghost", offers=["ghost"], unregister=False)
    serving.have("end", name="ghost")
    answer = alice.ask("connect", url="kernel://ghost/nsm-1")
    is_sentence(answer, "UNAVAILABLE", "endpoint ghost", "is its process running?")


def test_what_an_endpoint_refuses_with_arrives_word_for_word(alice, serving):
    text = "no more tables tonight for anyone; come back at eight"
    serving.have("serve", name="full", offers=["full"], refuse=["RESOURCE_EXHAUSTED", text])
    answer = alice.ask("connect", url="kernel://full/nsm-1")
    assert serving.have("serves", name="full")["held"] == []
    serving.have("end", name="full")
    assert is_sentence(answer, "RESOURCE_EXHAUSTED") == text


def test_an_endpoint_that_denies_is_permission_denied(alice, serving):
    serving.have(
        "serve", name="club", offers=["club"], refuse=["PERMISSION_DENIED", "members only"]
    )
    answer = alice.ask("connect", url="kernel://club/nsm-1")
    serving.have("end", name="club")
    text = is_sentence(answer, "PERMISSION_DENIED", "members only")
    assert text == "members only", "it is the endpoint's to say what to do"


def test_a_pool_without_addresses_says_which_and_frees_them_with_a_wire(alice, bob):
    wire = alice.have("connect", url="kernel://tiny/nsm-1")["wire"]
    answer = bob.ask("connect", url="kernel://tiny/nsm-1")
    is_sentence(answer, "RESOURCE_EXHAUSTED", "'tiny-pool'", "172.16.2.0/31", "2 held")
    alice.have("close", wire=wire)
    bob.have("close", wire=bob.have("connect", url="kernel://tiny/nsm-1")["wire"])


# --- what the interface shall be -------------------------------------------------------------


def test_a_name_taken_in_the_clients_namespace_stays_whose_it_is(alice, mesh):
    space = mesh.namespace("alice")
    subprocess.run(["ip", "-n", space, "link", "add", "nsm-1", "type", "bridge"], check=True)
    before = mesh.kernel()
    try:
        answer = alice.ask("connect", url="kernel://echo/nsm-1")
        is_sentence(answer, "ALREADY_EXISTS", "nsm-1", "client of 'echo'")
        assert mesh.kernel() == before
    finally:
        subprocess.run(["ip", "-n", space, "link", "del", "nsm-1"], check=True)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("sixteen-bytes-ab", "has 16 bytes, and Linux takes at most 15"),
        ("ünïcödë-nämé", "has 18 bytes"),
        ("a/b", "holds '/'"),
        ("..", "means something else"),
        ("a b", "holds ' '"),
        ("eth%d", "holds '%'"),
        ("a\nb", "holds '\\n'"),
    ],
)
def test_a_name_the_kernel_refuses_is_refused_before_it(alice, name, problem):
    answer = alice.ask("call", method="Request", message=asked(alice, name=name))
    is_sentence(answer, "INVALID_ARGUMENT", "interface name", "the client of 'echo'", problem)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "is empty"),
        ("echo", "names no mechanism"),
        ("kernel:echo", "names no mechanism"),
        ("kernel://", "names no service"),
        ("kernel:///nsm-1", "names no service"),
        ("kernel://echo/nsm-1-is-too-long", "has 17 bytes, and Linux takes at most 15"),
        ("kernel://echo/a%2Fb", "holds '/'"),
        ("kernel://echo/%zz", "broken %-escape"),
        ("kernel://echo@", "names no domain"),
        ("kernel://a@b@c", "two '@'"),
        ("kernel://echo/nsm 1", "holds ' '"),
        ("kernel://echo#x", "has a fragment"),
        ("kernel://echo?=x", "label without a name"),
        ("kernel://" + "x" * 5000, "has over 4096 bytes"),
    ],
)  # fmt: skip
def test_a_bad_nsurl_is_refused_with_its_mistake(alice, url, problem):
    is_sentence(alice.ask("connect", url=url), "INVALID_ARGUMENT", "NSURL", problem)


def test_a_mechanism_nobody_here_speaks_is_refused_by_client_and_mesh(alice):
    answer = alice.ask("connect", url="memif://echo/nsm-1")
    is_sentence(answer, "UNIMPLEMENTED", "'memif'", "memif://echo/nsm-1", "kernel://")
    message = asked(alice)
    message["mechanismPreferences"][0] |= {"type": "MEMIF"}
    answer = alice.ask("call", method="Request", message=message)
    is_sentence(answer, "UNIMPLEMENTED", "MEMIF", "'echo'", "ask for KERNEL")


async def test_a_name_taken_at_the_endpoint_leaves_nothing_at_the_client(alice, serving, mesh):
    space = mesh.namespace("serving")
    subprocess.run(["ip", "-n", space, "link", "add", "theirs", "type", "bridge"], check=True)
    try:
        serving.have("serve", name="narrow", offers=["narrow"], interface="theirs")
        before = mesh.kernel()
        answer = alice.ask("connect", url="kernel://narrow/nsm-1")
        is_sentence(answer, "ALREADY_EXISTS", "theirs", "endpoint narrow", "another name")
        assert mesh.kernel() == before
        assert serving.have("serves", name="narrow")["held"] == []
        serving.have("end", name="narrow")
    finally:
        subprocess.run(["ip", "-n", space, "link", "del", "theirs"], check=True)


# --- what vanishes ---------------------------------------------------------------------------


async def test_a_pod_killed_while_the_endpoint_thinks_leaves_nothing(mesh, serving):
    serving.have("serve", name="slow", offers=["slow"], gate=True)
    mortal = mesh.askers["mortal"]
    with workload() as pod:
        mortal.tell("connect", url="kernel://slow/nsm-1", namespace=pod.ns)
        await until(lambda: serving.have("serves", name="slow")["asked"], "the endpoint to think")
        os.kill(mortal.ask("who")["pid"], signal.SIGKILL)
        pod.kill()
        serving.have("open", name="slow")
        await until(
            lambda: not serving.have("serves", name="slow")["held"], "the endpoint to be told"
        )
        serving.have("end", name="slow")


def test_a_hop_takes_back_what_it_never_got_an_answer_for(mesh, alice):
    """It cannot name the id that the answer would have told it."""
    manager, token = mesh.askers["manager"], alice.have("mint")["token"]
    until_then = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 300))
    message = asked(alice)
    message["connection"]["id"] = "node-1-1"
    message["connection"]["path"] = {
        "index": 1,
        "pathSegments": [
            {**OWN, "token": token, "expires": until_then},
            {"name": "nsmgr-node-1", "id": "node-1-1"},
        ],
    }
    space = f"/run/netns/{mesh.namespace('alice')}"
    manager.have("link", message=message, send=space, to="forwarder")
    assert mesh.links("alice") == {"nsm-1"}
    manager.have("link", method="Close", message=message["connection"], send=space, to="forwarder")
    assert mesh.links("alice") == set()


async def test_a_namespace_that_goes_in_the_middle_ends_its_wire(alice, serving):
    """The Request's descriptor keeps it to the end of the Request; then it goes, and is told."""
    serving.have("serve", name="slow", offers=["slow"], gate=True)
    with workload() as pod:
        number = alice.tell("connect", url="kernel://slow/nsm-1", namespace=pod.ns)
        await until(lambda: serving.have("serves", name="slow")["asked"], "the endpoint to think")
        pod.kill()
        pod.process.wait()
        serving.have("open", name="slow")
        wire = alice.hear(number)["wire"]

        def told() -> list[list[str]]:
            return alice.have("told", wire=wire)["told"]

        await until(lambda: ["down", ""] in told(), "the client to be told that its wire is down")
        await until(
            lambda: not serving.have("serves", name="slow")["held"], "the endpoint to be told"
        )
        alice.have("close", wire=wire)
        answer = alice.ask("connect", url="kernel://slow/nsm-1", namespace=pod.ns)
        is_sentence(answer, "FAILED_PRECONDITION", pod.ns, "cannot be opened", "must exist")
    serving.have("end", name="slow")


async def test_an_endpoint_whose_namespace_is_gone_cannot_be_reached(alice, serving):
    with workload() as pod:
        serving.have("serve", name="dead", offers=["dead"], namespace=pod.ns)
        pod.kill()
        pod.process.wait()
        answer = alice.ask("connect", url="kernel://dead/nsm-1")
        is_sentence(answer, "FAILED_PRECONDITION", "endpoint 'dead'", pod.ns)
        serving.have("end", name="dead")


# --- who asks --------------------------------------------------------------------------------


def refusals(mesh: Mesh) -> list[str]:
    """What the manager of node-1 logged of those whose handshake failed."""
    log = next(log for log in mesh.logs() if log.name == "node-1.nsmgr")
    return [line for line in log.read_text().splitlines() if "refused pid" in line]


def test_a_right_certificate_from_the_same_hand_is_let_in(alice, mesh, home, tmp_path):
    """Else the refusals below could have another reason."""
    files = identity(tmp_path, home, f"spiffe://{DOMAIN}/client/alice", home)
    answer = alice.ask("link", message=asked(alice, "nothing"), identity=files)
    is_sentence(answer, "NOT_FOUND", "nothing")


def test_an_expired_certificate_is_refused(alice, home, tmp_path):
    past = time.time_ns() - 2 * HOUR
    files = identity(tmp_path, home, f"spiffe://{DOMAIN}/client/alice", home, ttl=HOUR, now=past)
    answer = alice.ask("link", message=asked(alice), identity=files)
    is_sentence(
        answer, "UNAUTHENTICATED", "nsm.io.sock", f"spiffe://{DOMAIN}/client/alice", "expired", ";"
    )


def test_a_certificate_of_a_foreign_domain_is_refused(alice, mesh, home, tmp_path):
    foreign = Authority.create("foreign.test")
    files = identity(tmp_path, foreign, "spiffe://foreign.test/client/alice", home)
    answer = alice.ask("link", message=asked(alice), identity=files)
    is_sentence(
        answer,
        "UNAUTHENTICATED",
        "nsm.io.sock",
        "our certificate of spiffe://foreign.test/client/alice",
        "no authority it knows signed",
        "each needs the other's bundle",
    )
    assert any("does not chain to any bundle here" in one for one in refusals(mesh))


def test_a_certificate_that_only_claims_our_domain_is_refused(alice, home, tmp_path):
    forger = Authority.create(DOMAIN)
    files = identity(tmp_path, forger, f"spiffe://{DOMAIN}/node/node-1/nsmgr", home)
    answer = alice.ask("link", message=asked(alice), identity=files)
    is_sentence(
        answer,
        "UNAUTHENTICATED",
        "nsm.io.sock",
        f"our certificate of spiffe://{DOMAIN}/node/node-1/nsmgr",
        "no authority it knows signed",
        "each needs the other's bundle",
    )


def test_a_manager_of_a_foreign_domain_is_not_believed(alice, home, tmp_path):
    foreign = Authority.create("foreign.test")
    files = identity(tmp_path, home, f"spiffe://{DOMAIN}/client/alice", foreign)
    answer = alice.ask("link", message=asked(alice), identity=files)
    is_sentence(answer, "UNAUTHENTICATED", "nsm.io.sock")


@pytest.mark.parametrize(
    ("token", "problem"),
    [
        (None, "it has no token"),
        ({"text": "not.a.jwt"}, "no JSON"),
        ({"text": "x"}, "no JWT"),
        ({"exp": -60}, "expired"),
        ({"alg": "none"}, "not signed (ES256)"),
        ({"alg": "HS256"}, "not signed (ES256)"),
        ({"key": "another"}, "not signed (ES256)"),
        ({"aud": ["spiffe://home.test/somebody/else"]}, "is meant for spiffe://home.test/somebody/else"),
        ({"aud": "spiffe://home.test/node/node-1/nsmgr"}, "is meant for nobody"),
    ],
    ids=["none", "no-json", "no-jwt", "expired", "alg-none", "hs256", "another-key",
         "other-audience", "bare-audience"],
)  # fmt: skip
def test_a_token_that_proves_nothing_is_refused(alice, token, problem):
    answer = alice.ask("call", method="Request", message=asked(alice), token=token)
    is_sentence(answer, "PERMISSION_DENIED", "client/alice", problem, "no sufficient privileges")


def test_a_replayed_token_is_refused(alice, bob):
    token = alice.have("mint")["token"]
    answer = bob.ask("call", method="Request", message=asked(bob), token={"text": token})
    is_sentence(answer, "PERMISSION_DENIED", "client/bob", "not signed (ES256)", "TLS peer")


def test_a_token_for_the_manager_opens_nothing_at_the_forwarder(alice, mesh):
    """Neither who made it nor whom it was passed on to can use it at another hop."""
    made = alice.have("call", method="Request", message=asked(alice))
    own, managers = (hop["token"] for hop in made["answer"]["path"]["pathSegments"][:2])
    for token, problem in (
        (own, f"is meant for spiffe://{DOMAIN}/node/node-1/nsmgr"),
        (managers, "not signed (ES256)"),
    ):
        for message in (asked(alice, name="nsm-2"), asked(alice, "nothing")):
            answer = alice.ask(
                "call", method="Request", message=message, to="forwarder", token={"text": token}
            )
            is_sentence(answer, "PERMISSION_DENIED", "client/alice", problem)
    assert mesh.links("alice") == {"nsm-1"}
    alice.have("call", method="Close", message=made["answer"])


def test_somebody_elses_connection_can_be_neither_asked_for_nor_closed(alice, bob, mesh):
    wire = alice.have("connect", url="kernel://echo/nsm-1")
    hop = wire["path"][1]
    stolen = asked(bob, name="nsm-9")
    stolen["connection"]["path"]["pathSegments"] += [hop]
    for method, message in (("Request", stolen), ("Close", stolen["connection"])):
        answer = bob.ask("call", method=method, message=message)
        is_sentence(answer, "PERMISSION_DENIED", hop["id"], "client/alice", "client/bob")
    bare = {"id": hop["id"], "networkService": "echo"}
    answer = bob.ask("call", method="Close", message=bare)
    is_sentence(answer, "PERMISSION_DENIED", hop["id"])
    inner = wire["path"][2]
    stolen["connection"]["path"]["pathSegments"][1] = inner
    for method, message in (("Request", stolen), ("Close", stolen["connection"])):
        answer = bob.ask("call", method=method, message=message, to="forwarder")
        is_sentence(answer, "PERMISSION_DENIED", inner["id"], "node/node-1/nsmgr", "client/bob")
    assert mesh.links("alice") == {"nsm-1"}
    assert mesh.pings("alice", wire["dst"][0])
    alice.have("close", wire=wire["wire"])


def test_an_endpoints_name_belongs_to_who_took_it(bob):
    answer = bob.ask("serve", name="responder", offers=["echo"], patience=0.0)
    is_sentence(
        answer,
        "PERMISSION_DENIED",
        "'responder'",
        "endpoint/responder",
        "client/bob",
        "another name",
    )


# --- descriptors -----------------------------------------------------------------------------


def test_a_descriptor_that_never_comes_is_waited_for_two_seconds(alice):
    answer = alice.ask("link", message=asked(alice))
    is_sentence(
        answer, "UNAVAILABLE", "no file descriptor of inode://", "within 2 s", "send the open file"
    )
    write("a descriptor that never comes is given up", answer["seconds"], 2.5)
    assert 1.5 < answer["seconds"] < 8


def test_an_endpoint_whose_descriptor_never_comes_is_named(alice, serving):
    serving.have("serve", name="shy", offers=["shy"], announces="inode://4/4026599999")
    answer = alice.ask("connect", url="kernel://shy/nsm-1")
    is_sentence(answer, "UNAVAILABLE", "inode://4/4026599999", "endpoint shy", "within")
    assert serving.have("serves", name="shy")["held"] == []
    serving.have("end", name="shy")


@pytest.mark.parametrize("what", ["/proc/self/ns/mnt", "/dev/null", "/etc/passwd", "/"])
def test_a_descriptor_of_something_else_is_no_network_namespace(alice, what):
    answer = alice.ask("link", message=asked(alice), send=what)
    is_sentence(answer, "INVALID_ARGUMENT", "network namespace", "the client of 'echo'")


def test_another_processes_namespace_cannot_be_named_by_path(alice, bob):
    message = asked(bob)
    answer = alice.ask("call", method="Request", message=message)
    is_sentence(answer, "PERMISSION_DENIED", "/ns/net", "client/alice", "name your own namespace")


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "file:///proc/1/root/etc/passwd", "file:///proc/self/ns/mnt", "x", ""],
)
def test_a_path_that_names_no_namespace_is_refused(alice, url):
    message = asked(alice)
    message["mechanismPreferences"][0]["parameters"]["inodeURL"] = url
    answer = alice.ask("call", method="Request", message=message)
    is_sentence(answer, "INVALID_ARGUMENT", "network namespace", repr(url))


# --- what nobody honest sends ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ({"index": 5, "pathSegments": [OWN]}, ("Path.Index+1==6", "behind its last segment")),
        ({"index": 4294967295, "pathSegments": [OWN]}, ("Path.Index+1==4294967296",)),
        ({"pathSegments": [{"name": "raw", "id": "another"}]}, ("'another'", "'raw-1'")),
        ({"index": 2, "pathSegments": [{"name": "a", "id": "1"}, {}, OWN]}, ("segment",)),
        ({"pathSegments": [OWN] * 10_000}, ("10000 segments", "at most 64")),
        ({"pathSegments": [{"name": "x" * 1000, "id": "raw-1"}]}, ("segment 0", "512 bytes")),
    ],
    ids=["behind-the-end", "far-behind", "wrong-id", "hole", "too-many", "long-name"],
)  # fmt: skip
def test_a_path_that_leads_nowhere_is_refused(alice, path, words):
    answer = alice.ask("call", method="Request", message=asked(alice, path=path))
    code = "PERMISSION_DENIED" if words == ("segment",) else "INVALID_ARGUMENT"
    is_sentence(answer, code, *words)


def test_a_megabyte_in_a_label_is_refused(alice):
    message = asked(alice, labels={"a": "x" * (1 << 20)})
    answer = alice.ask("call", method="Request", message=message)
    is_sentence(answer, "RESOURCE_EXHAUSTED", "at most 262144", "through the wire, not beside it")


def test_labels_of_more_than_their_share_are_refused(alice):
    message = asked(alice, labels={"a": "x" * 70_000})
    answer = alice.ask("call", method="Request", message=message)
    is_sentence(answer, "INVALID_ARGUMENT", "70001 characters of labels", "at most 65536")


def test_a_message_over_four_megabytes_is_refused(alice):
    message = asked(alice, labels={"a": "x" * (5 << 20)})
    answer = alice.ask("call", method="Request", message=message)
    is_sentence(answer, "RESOURCE_EXHAUSTED", "4194304")


# --- processes that cannot start -------------------------------------------------------------


def test_a_forwarder_that_is_not_root_says_what_it_lacks(mesh, tmp_path):
    code, said = Started(mesh, "forwarder", "node-1/forwarder", user="nobody",
                         NSM_LISTEN_ON=f"unix://{tmp_path}/f.sock").ends()  # fmt: skip
    assert code == 3, said
    assert "CAP_NET_ADMIN" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("module", "like", "port"),
    [("nsmgr", "node-1/nsmgr", 5001), ("registry", "node-1/registry", 5002)],
)
def test_a_port_that_is_taken_is_told_with_its_holder(mesh, tmp_path, module, like, port):
    listen = f"tcp://198.18.0.1:{port}"
    code, said = Started(mesh, module, like, NSM_LISTEN_ON=listen,
                         NSM_STORE=str(tmp_path / "store")).ends()  # fmt: skip
    assert code == 1, said
    holder = f"process {mesh.pid(like)} (python -P -m {module} "
    for word in (listen, holder, "NSM_LISTEN_ON", f"port {port}"):
        assert word in said
    assert "Traceback" not in said


def test_without_a_manager_the_client_ends_with_where_it_looked(mesh):
    code, said = Started(
        mesh, "nsm.process.client", "node-1/responder", NSM_NAME="late", NSM_PATIENCE="100ms",
        NSM_NETWORK_SERVICES="kernel://echo", NSM_CONNECT_TO="unix:///nowhere/nsm.io.sock",
    ).ends()  # fmt: skip
    assert code == 4, said
    assert "unix:///nowhere/nsm.io.sock" in said


@pytest.mark.parametrize(
    ("socket", "code", "words"),
    [
        ("tcp://127.0.0.1:8081", 2, ("SPIFFE_ENDPOINT_SOCKET", "unix://")),
        ("/run/agent.sock", 2, ("SPIFFE_ENDPOINT_SOCKET",)),
    ],
)
def test_an_agent_that_is_none_is_refused_at_once(mesh, socket, code, words):
    ended, said = Started(
        mesh, "nsm.process.client", "node-1/responder", NSM_NAME="late",
        NSM_NETWORK_SERVICES="kernel://echo", SPIFFE_ENDPOINT_SOCKET=socket,
    ).ends()  # fmt: skip
    assert ended == code, said
    for word in words:
        assert word in said


def test_an_agent_that_is_away_is_named(mesh):
    code, said = Started(
        mesh, "nsmctl services --identity unix:///nowhere/agent.sock", "node-1/responder",
        NSM_CONNECT_TO=mesh.url("node-1"),
    ).ends()  # fmt: skip
    assert code == 4, said
    assert "unix:///nowhere/agent.sock" in said
