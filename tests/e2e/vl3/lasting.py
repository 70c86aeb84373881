"""One TCP connection between two members, which has to last: 20 MB in 7 s, and what it was.

    python3 lasting.py receive ADDRESS        python3 lasting.py send ADDRESS OWN

Both say, at the end, which socket it was: its inode, and both ends. The receiver says how much
came whenever it is asked by a line. The sender is slow near the end until a line says that
it may end: so a machine that is busy has it still running when the last thing happens.
"""

import hashlib
import json
import os
import select
import socket
import sys

AMOUNT, RATE, PORT = 20_000_000, 3_000_000, 8081  # bytes; bytes a second
ENOUGH, SLOW = 16_000_000, 50_000  # bytes until it is told to go on; bytes a second meanwhile
PACING = 47  # SO_MAX_PACING_RATE


def family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def which(one: socket.socket) -> list[object]:
    return [os.fstat(one.fileno()).st_ino, one.getsockname()[:2], one.getpeername()[:2]]


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def receive(address: str) -> None:
    with socket.create_server((address, PORT), family=family(address)) as listening:
        say(listening=True)
        taken, _ = listening.accept()
    with taken:
        before, total, digest = which(taken), 0, hashlib.sha256()
        after = before
        while True:
            ready, _, _ = select.select([taken, sys.stdin], [], [])
            if sys.stdin in ready:
                sys.stdin.readline()
                say(came=total)
            if taken in ready:
                if not (data := taken.recv(1 << 16)):
                    break
                total += len(data)
                digest.update(data)
                if total == AMOUNT:
                    after = which(taken)
                    taken.send(b".")
        say(total=total, sha256=digest.hexdigest(), before=before, after=after)


def send(address: str, own: str) -> None:
    with socket.socket(family(address), socket.SOCK_STREAM) as to:
        to.setsockopt(socket.SOL_SOCKET, PACING, RATE)
        to.bind((own, 0))
        to.connect((address, PORT))
        before, digest = which(to), hashlib.sha256()
        told = False
        for sent in range(0, AMOUNT, 10_000):
            if sent == ENOUGH and not told:
                to.setsockopt(socket.SOL_SOCKET, PACING, SLOW)
            room = False
            while not room:
                said, free, _ = select.select([] if told else [sys.stdin], [to], [])
                room = bool(free)
                if said:
                    sys.stdin.readline()
                    told = True
                    to.setsockopt(socket.SOL_SOCKET, PACING, RATE)
            data = os.urandom(10_000)
            digest.update(data)
            to.sendall(data)
        assert to.recv(1) == b".", "the other end has not got all of it"
        say(sha256=digest.hexdigest(), before=before, after=which(to))


if __name__ == "__main__":
    {"receive": receive, "send": send}[sys.argv[1]](*sys.argv[2:])
