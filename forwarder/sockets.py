"""Sockets of this node's endpoints, kept for as long as a wire leads to them.

An endpoint's socket comes as a descriptor from the registry and has no path we
could reach. Wires to one endpoint share one descriptor and so one connection.
The descriptor refers to the socket's file, not to a namespace: it pins nobody.
"""

import os


class Sockets:
    """Kept descriptors by the file they refer to, counted by who uses them."""

    def __init__(self) -> None:
        self._by_file: dict[tuple[int, int], str] = {}
        self._uses: dict[str, int] = {}
        self._fds: dict[str, int] = {}

    def keep(self, fd: int) -> str:
        """Keep (a duplicate of) fd until `release`; return the URL to dial."""
        facts = os.fstat(fd)
        file = (facts.st_dev, facts.st_ino)
        url = self._by_file.get(file)
        if url is None:
            own = os.dup(fd)
            url = f"unix:///proc/self/fd/{own}"
            self._by_file[file] = url
            self._fds[url] = own
        self._uses[url] = self._uses.get(url, 0) + 1
        return url

    def again(self, url: str) -> str:
        """One more use of a URL that is kept already; any other URL is returned as it is."""
        if url in self._uses:
            self._uses[url] += 1
        return url

    def release(self, url: str) -> None:
        """One use less of url; the last closes it. A URL that was never kept is nothing."""
        if url not in self._uses:
            return
        self._uses[url] -= 1
        if not self._uses[url]:
            del self._uses[url]
            fd = self._fds.pop(url)
            self._by_file = {file: kept for file, kept in self._by_file.items() if kept != url}
            os.close(fd)

    def close(self) -> None:
        """Let go of everything."""
        for url, uses in list(self._uses.items()):
            for _ in range(uses):
                self.release(url)

    def __len__(self) -> int:
        return len(self._fds)
