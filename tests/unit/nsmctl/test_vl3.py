"""Which address plan is meant in a lab, and what a network is called by the state it is in."""

from dataclasses import replace

from labs import lab, processes
from labs.paths import Paths
from nsm import ondemand
from nsm.model import Endpoint, Service
from nsm.rpc.prefixes import AddressPool, LentPrefix
from nsmctl.vl3 import Network, _advice, _take_back, _Where, plans_of

POOL = AddressPool("orders", ("10.0.0.0/16",), 24)
SERVICE = Service(name="orders", payload="IP")


def test_a_labs_address_plan_is_where_its_process_listens() -> None:
    running = processes.plan(lab.read(lab.find("one-node")), Paths("one-node")).processes
    assert plans_of(running) == []
    heard = {"NSM_LISTEN_ON": "unix:///run/x.sock,tcp://198.18.0.1:5006"}
    plan = replace(running[0], module="endpoints.ipam", environment=heard)
    assert plans_of([*running, plan]) == ["tcp://198.18.0.1:5006"]


def test_a_network_is_called_by_what_there_is_of_it() -> None:
    routers = (Endpoint(name="a"), Endpoint(name="b"))
    assert Network("orders", POOL, SERVICE, routers).state == "2 routers"
    assert Network("orders", POOL, SERVICE, routers[:1]).state == "1 router"
    assert Network("orders", POOL, None, routers).state == "no service"
    assert Network("orders", None, SERVICE, routers).state == "no pool"
    assert Network("", replace(POOL, name="")).state == "for routers that name no pool"
    on_demand = replace(SERVICE, matches=ondemand.matches("orders"))
    assert Network("orders", POOL, on_demand).state == "0 routers, on demand"
    facts = Network("orders", None, SERVICE).facts()
    assert (facts["pool"], facts["leases"], facts["on_demand"]) == (None, [], False)


class Plan:
    """An address plan that has one pool."""

    def __init__(self, *pools: AddressPool) -> None:
        self.has = {one.name: one for one in pools}

    async def pools(self) -> list[AddressPool]:
        return list(self.has.values())

    async def delete(self, name: str) -> None:
        del self.has[name]


async def test_a_pool_is_taken_back_however_its_prefixes_are_written() -> None:
    made = replace(POOL, prefixes=("2001:DB8:4:0::/64", "10.0.0.0/16"))
    kept = replace(POOL, prefixes=("10.0.0.0/16", "2001:db8:4::/64"))
    lent = replace(kept, leases=(LentPrefix("10.0.0.0/24", "spiffe://d/r"),))
    for there, stays in ((kept, False), (POOL, True), (lent, True)):
        plan = Plan(there)
        await _take_back(_Where(None, plan), made)  # type: ignore[arg-type]
        assert bool(plan.has) == stays


def test_what_starts_routers_is_shown_apart_from_them() -> None:
    on_demand = replace(SERVICE, matches=ondemand.matches("orders"))
    labels = {"orders": {ondemand.ROLE: ondemand.SUPPLIER, "nodeName": "n1"}}
    supplier = Endpoint("supplier-n1", ("orders",), labels, path_ids=("spiffe://d/supplier",))
    facts = Network("orders", POOL, on_demand, (), (supplier,)).facts()
    assert (facts["on_demand"], facts["routers"]) == (True, [])
    assert facts["suppliers"] == [
        {"name": "supplier-n1", "node": "n1", "identity": "spiffe://d/supplier"}
    ]
    assert _advice(Network("orders", POOL, on_demand, (), (supplier,))) == ""
    assert "nobody starts its routers" in _advice(Network("orders", POOL, on_demand))
    assert "--on-demand" in _advice(Network("orders", POOL, SERVICE, (), (supplier,)))
