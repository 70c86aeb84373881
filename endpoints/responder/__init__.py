"""The simplest endpoint: hands out addresses; the kernel answers pings."""
