"""Who is in the domain of these tests."""

ROUTERS, MEMBERS = ("r1", "r2", "r3"), ("m1", "m2", "m3", "m4", "m5")
