"""The port that all shards listen on: it is ours alone, and known before the first of them."""

from __future__ import annotations

import os
import socket

from facelane_server.config import AddressError


class Port:
    """Holds a place among those who share the port, without listening: nobody is sent here.

    Shards share it by SO_REUSEPORT, which would let another server in as well, without a word: so
    it is asked for alone first. ``number`` is what the system gave where the configuration says 0.
    """

    def __init__(self, held: socket.socket | None, number: int) -> None:
        self._held = held
        self.number = number

    @classmethod
    def hold(cls, listen: str) -> Port:
        """Raises ``AddressError`` when somebody else has the port, or there is no such address."""
        if listen.startswith("unix:"):
            return cls(None, 0)
        host, _, port = listen.rpartition(":")
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                host.strip("[]"), int(port), type=socket.SOCK_STREAM
            )[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                number = int(probe.getsockname()[1])
            held = socket.socket(family, kind)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind((address[0], number, *address[2:]))
        except OSError as error:
            why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
            raise AddressError(
                f"server.listen: cannot listen on {listen}: {why}; end the process that has it, "
                "or listen elsewhere"
            ) from None
        return cls(held, number)

    def close(self) -> None:
        if self._held is not None:
            self._held.close()
