"""The node's door: takes requests, picks the forwarder, keeps the node's registrations."""
