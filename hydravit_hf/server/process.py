"""The process of the server: it takes an address, serves, and answers what it has accepted before it stops."""

import asyncio
import gc
import math
import socket
import sys
import time

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from .service import Service

GRACE_S = 1.0  # after SIGTERM, the time in which clients with an open connection are told to close it


class Server(uvicorn.Server):
    """A server that answers all that it has accepted before it stops.

    After SIGTERM or SIGINT, `/health` says so and each answer asks its client to close the connection. After `GRACE_S`,
    no connection is accepted. The process ends, with exit code 0, after the last answer. A second signal ends it at
    once.
    """

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service
        self._stop_at = math.inf

    def handle_exit(self, sig, frame):
        """Begin to stop."""
        if self.service.is_draining:
            self.force_exit = True
        self.service.is_draining = True
        self._stop_at = time.monotonic() + GRACE_S

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop now."""
        if time.monotonic() >= self._stop_at:
            self.should_exit = True
        return await super().on_tick(counter)


class TimedProtocol(AutoHTTPProtocol):
    """A connection that is closed if the head of a request does not come in time. uvicorn itself waits for ever."""

    timeout_s = 10.0

    def connection_made(self, transport):
        """Begin to watch the connection."""
        super().connection_made(transport)
        self._idle_since = time.monotonic()
        self._watch = asyncio.get_running_loop().call_later(self.timeout_s, self._close_if_idle)

    def connection_lost(self, exc):
        """Stop watching."""
        self._watch.cancel()
        super().connection_lost(exc)

    def on_response_complete(self):
        """Begin to wait for the next request."""
        self._idle_since = time.monotonic()
        super().on_response_complete()

    def _close_if_idle(self):
        is_busy = self.cycle is not None and not self.cycle.response_complete
        left = self.timeout_s - (0 if is_busy else time.monotonic() - self._idle_since)
        if left > 0:
            self._watch = asyncio.get_running_loop().call_later(left, self._close_if_idle)
            return
        if self.cycle is None:  # there was no request at all; a client that pauses after an answer gets no other one
            body = b'{"detail":"The request did not arrive in time."}'
            head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """Take an address for a server that is not ready yet: clients are refused until it listens.

    Raises:
        OSError: The address is in use, or is none of this machine.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    # asyncio lets a connection send at once (TCP_NODELAY) only if its socket names the protocol. Otherwise, the body of
    # an answer waits until the client has acknowledged the head, which takes 40 ms.
    bound = socket.socket(family, proto=socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(f"The address {host}:{port} can't be used: {error.strerror}") from error
    return bound


def serve(service: Service, bound: socket.socket):
    """Serve until SIGTERM or SIGINT, and then until the last accepted request is answered."""
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each connection takes a file
    gc.collect()
    gc.freeze()  # else each full collection would look at all of torch again, which takes longer than many batches
    protocol = type("Protocol", (TimedProtocol,), {"timeout_s": service.limits.timeout_s})
    config = uvicorn.Config(
        service.app, http=protocol, log_level="warning", access_log=False, lifespan="off", ws="none"
    )
    Server(config, service).run(sockets=[bound])
