"""Names on a vL3: what members are called, a router's server of that, a client's resolver.

`templates` and `zones` decide and do no I/O. `server` takes questions off sockets, `asking`
sends them to other servers; `router` and `resolver` are what answers: the one knows its
members and asks other routers, the other knows whom to ask, and `resolvconf` leads a
workload's programs to it. With `nsm.resolve` the only ones with dnspython.
"""
