"""A node's supplier: it starts an endpoint of the node when somebody asks for one."""
