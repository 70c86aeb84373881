"""Holds a port of its own, and says so in /run/held-PORT: python holder.py tcp-5001 ADDRESS.

With a third word it only talks from that port, to a listener of its own.
"""

import os
import socket
import sys
import time

name, address, *talking = sys.argv[1:]
protocol, _, port = name.partition("-")
kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
held = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
held.bind((address, int(port)))
if talking:
    other = socket.create_server(("127.0.0.1", 0))
    held.connect(other.getsockname())
elif protocol == "tcp":
    held.listen()
with open(f"/run/.{name}", "w") as file:
    file.write(f"{name} {os.getpid()}\n")
os.rename(f"/run/.{name}", f"/run/held-{name}")
time.sleep(600)
