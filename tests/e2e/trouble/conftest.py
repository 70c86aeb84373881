"""Ordinary trouble: what people meet on machines that are not as we would have them."""

import os

# It takes minutes and a network: `make matrix` asks for it.
collect_ignore = [] if os.environ.get("VWIRE_MATRIX") else ["test_bookworm.py"]
