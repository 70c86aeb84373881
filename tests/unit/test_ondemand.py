"""Services whose endpoints are started when somebody asks."""

import pytest

from nsm.model import Endpoint, Service
from nsm.ondemand import ROLE, ROUTER, SUPPLIER, is_on_demand, matches, supplies
from nsm.selection import match_endpoints


def offered(service: str, role: str, node: str, cluster: str = "east") -> Endpoint:
    labels = {ROLE: role, "nodeName": node, "clusterName": cluster}
    return Endpoint(f"{role}-{cluster}-{node}", (service,), {service: labels})


@pytest.mark.parametrize("service", ["net", "net@meet"])
def test_a_client_gets_its_own_nodes_router_or_else_its_supplier(service: str) -> None:
    all_ = [
        offered(service, role, node, cluster)
        for role in (SUPPLIER, ROUTER)
        for node in ("n1", "n2")
        for cluster in ("east", "west")
        if (role, node, cluster) != (ROUTER, "n1", "east")
    ]
    net = Service(service, "IP", matches(service))

    def found(**labels: str) -> set[str]:
        return {one.endpoint.name for one in match_endpoints(net, labels, all_)}

    shared = "@" in service
    n1 = found(nodeName="n1", clusterName="east")
    assert n1 == ({"supplier-east-n1"} if shared else {"router-west-n1"})
    n2 = found(nodeName="n2", clusterName="west")
    assert n2 == {"router-west-n2"} | (set() if shared else {"router-east-n2"})
    assert found(nodeName="n3", clusterName="east") == set()
    assert found() == set()
    assert bool(found(nodeName="n2")) is not shared


def test_suppliers_are_known_by_the_label_of_the_service_asked_about() -> None:
    supplier = offered("net", SUPPLIER, "n1")
    assert supplies(supplier, "net")
    assert not supplies(supplier, "other")
    assert not supplies(offered("net", ROUTER, "n1"), "net")
    assert is_on_demand(Service("net", "IP", matches("net")))
    assert not is_on_demand(Service("net", "IP"))
