"""The registry as a domain's proxy offers it: this domain's questions to other domains (§9.3).

Everything is passed on to the registry proxy, which knows where domains are. Only
URLs change: who asks for an endpoint of another domain is told ours, and so is the
other domain whose registry holds an endpoint of this one. So requests come here,
and we know from here where they go on.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace

from nsm.caller import Caller
from nsm.domains import domain_of, join, split
from nsm.errors import InvalidError, NotFoundError
from nsm.model import Endpoint, Found, Service
from nsm.registration import Registration, RegistrationPath
from nsm.rpc import addresses
from nsm.rpc.passing import admit
from nsm.rpc.registry_services import Store
from nsmgr.proxy.addresses import AddressMap
from nsmgr.proxy.names import Names


class ProxyRegistry(Store):
    """What this domain sees of other domains' registries, and they of its endpoints.

    public_url is told instead of an endpoint's own, and is set once it is known.
    addresses and labels are asked for each time: their files change.
    """

    def __init__(
        self,
        beyond: Store,
        names: Names,
        addresses: Callable[[], AddressMap],
        labels: Callable[[], Mapping[str, str]],
    ) -> None:
        self.public_url = ""
        self._beyond = beyond
        self._names = names
        self._addresses = addresses
        self._labels = labels

    async def register_endpoint(
        self, asked: Endpoint, by: Registration
    ) -> tuple[Endpoint, RegistrationPath]:
        """Register an endpoint of ours in another domain, under our URL as seen from there."""
        admit(by.caller, asked)
        if not _dialled(asked.url):
            where = f"at {asked.url[:256]!r}" if asked.url else "without a URL"
            raise InvalidError(
                f"endpoint {asked.name!r} of {by.owner} registers {where}",
                hint="say where its manager listens: tcp://…",
            )
        if not split(asked.name)[1]:
            domain = domain_of(asked)
            raise InvalidError(
                f"endpoint {asked.name!r} of {by.owner} registers in domain {domain!r} under a name"
                " without a domain, by which nobody here would find it",
                hint=f"call it {join(asked.name, domain)} (NSM_NAME)",
            )
        more = self._labels()
        told = replace(
            asked,
            url=self._addresses().outside_url(self.public_url),
            labels=_with(more, asked) if more else asked.labels,
        )
        held, path = await self._beyond.register_endpoint(told, by)
        self._names.register(held.name, asked.url, min(by.expires, held.expires or by.expires))
        # What the cluster says is not the endpoint's own word: it may say otherwise next time.
        return replace(held, url=asked.url, labels=asked.labels), path

    async def unregister_endpoint(self, asked: Endpoint, by: Registration) -> None:
        """Take it from the other domain."""
        admit(by.caller, asked)
        told = replace(asked, url=self._addresses().outside_url(self.public_url))
        await self._beyond.unregister_endpoint(told, by)
        self._names.unregister(asked.name)

    async def find_endpoints(
        self, query: Endpoint, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Endpoint], None]:
        """What another domain tells, all of it met through us."""
        admit(caller, query)
        async with aclosing(self._beyond.find_endpoints(query, watch, caller)) as told:
            async for found in told:
                self._learn(found)
                yield replace(found, item=replace(found.item, url=self.public_url))

    async def ask(self, name: str, caller: Caller) -> str:
        """Where its domain says now that name is met; "" if it leads to ourselves.

        Raises NotFoundError, in upstream's words, if it is not registered there.
        """
        query = Endpoint(name=name)
        async with aclosing(self._beyond.find_endpoints(query, False, caller)) as told:
            async for found in told:
                if found.item.name == name and not found.deleted:
                    self._learn(found)
                    if not _dialled(found.item.url):
                        raise NotFoundError(
                            f"network service endpoint {name} not found at"
                            f" {found.item.url[:256]!r}, as its domain says",
                            hint="nobody of another domain reaches that: its manager listens at"
                            " tcp://…",
                        )
                    return "" if self._is_own(found.item.url) else found.item.url
        self._names.lose(name)
        raise NotFoundError(
            f"network service endpoint {name} not found",
            hint="its domain's registry does not hold it now: is it running?",
        )

    def _learn(self, found: Found[Endpoint]) -> None:
        endpoint = found.item
        if found.deleted or not _dialled(endpoint.url) or self._is_own(endpoint.url):
            self._names.lose(endpoint.name)
        else:
            self._names.find(endpoint.name, endpoint.url, endpoint.expires)

    def _is_own(self, url: str) -> bool:
        return url in (self.public_url, self._addresses().outside_url(self.public_url))

    async def register_service(
        self, asked: Service, by: Registration
    ) -> tuple[Service, RegistrationPath]:
        """Services have no URL: passed on as they are."""
        admit(by.caller, asked)
        return await self._beyond.register_service(asked, by)

    async def unregister_service(self, asked: Service, by: Registration) -> None:
        """Services have no URL: passed on as they are."""
        admit(by.caller, asked)
        await self._beyond.unregister_service(asked, by)

    async def find_services(
        self, query: Service, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Service], None]:
        """Services have no URL: passed on as they are."""
        admit(caller, query)
        async with aclosing(self._beyond.find_services(query, watch, caller)) as told:
            async for found in told:
                yield found


def _with(more: Mapping[str, str], asked: Endpoint) -> dict[str, Mapping[str, str]]:
    """Its labels with more over them, for each service, be it without any so far."""
    services = dict.fromkeys((*asked.services, *asked.labels))
    return {service: {**asked.labels.get(service, {}), **more} for service in services}


def _dialled(url: str) -> bool:
    """Whether it is a place on the network: another domain names none on this machine."""
    try:
        return isinstance(addresses.parse(url), addresses.Tcp)
    except InvalidError:
        return False
