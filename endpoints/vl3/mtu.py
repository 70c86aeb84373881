"""The smallest MTU of a router's wires: what every member must keep to (`wire.md` §10.7). Pure."""

LEAST = {4: 576, 6: 1280}  # what every IPv4 (RFC 791) and IPv6 (RFC 8200) way passes


class Smallest:
    """It only falls: what was too large once is too large for somebody still."""

    def __init__(self) -> None:
        self.now = 0
        """0 while nobody said any."""

    def note(self, mtu: int, families: tuple[int, ...] = (4,)) -> bool:
        """A wire's MTU, 0 if it said none; whether it is a new smallest.

        Less than what IP needs is one member's trouble, which the others do not share.
        """
        if mtu <= 0:
            return False
        mtu = max(mtu, *(LEAST[one] for one in families), 0)
        if self.now and mtu >= self.now:
            return False
        self.now = mtu
        return True

    def of(self, mtu: int) -> int:
        """What to say of a wire of that MTU."""
        return min(one for one in (mtu, self.now) if one) if mtu or self.now else 0
