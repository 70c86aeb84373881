"""A trust domain, and callers whose handshakes and tokens are real."""

import time

from nsm.caller import Caller
from nsm.identity import tokens
from nsm.identity.source import Handshake
from nsm.model import SECOND
from tests.support.certs import Authority

LIFETIME = 600 * SECOND


class Mesh:
    """Who is who in a test: an SVID each, and what a call from one to another looks like."""

    def __init__(self):
        self.authority = Authority("td")
        self._svids = {}

    def svid(self, name):
        return self._svids.setdefault(name, self.authority.svid(f"/{name}"))

    def call(self, who, to="hop", *, token=True, lifetime=LIFETIME, deadline=None):
        """A call as `to` sees it, from `who`, over a connection of their own."""
        caller, own = self.svid(who), self.svid(to)
        made = tokens.issue(
            caller, own.id, lifetime, peer_not_after=own.not_after, now=time.time_ns()
        )
        return Caller(
            handshake=Handshake(own, caller.id, caller.leaf, caller.not_after),
            token=made.text if token else "",
            token_expires=made.expires if token else None,
            deadline=deadline,
        )
