"""Domains for a test, and workloads in them."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nsm.rpc.registry import RegistryClient
from tests.e2e.registry.realms import Realms, realms
from tests.e2e.registry.two import DOOR, NAMES, Two


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Realms]:
    async with realms(tmp_path) as all_of_them:
        yield all_of_them


@pytest.fixture
async def two(made: Realms, tmp_path: Path) -> Two:
    one, other = await made.make("one.test", "two.test", programs=NAMES)
    far = await other.start("registry")
    domains = Two(one, other, far, far, far, tmp_path / "domains.yaml")
    domains.say(two={"registry": [far.url], "nsmgr-proxy": [DOOR]})
    domains.proxy = await one.start(
        "registry-proxy", "registry-proxy", NSM_DOMAINS_PATH=str(domains.file)
    )
    domains.registry = await one.start("registry", NSM_PROXY_REGISTRY_URL=domains.proxy.url)
    return domains


@pytest.fixture
async def nse(two: Two) -> AsyncIterator[RegistryClient]:
    """An endpoint of domain one, at its registry."""
    async with two.one.client("nse", two.registry) as client:
        yield client


@pytest.fixture
async def there(two: Two) -> AsyncIterator[RegistryClient]:
    """A workload of domain two, at its own registry."""
    async with two.two.client("looker", two.far) as client:
        yield client
