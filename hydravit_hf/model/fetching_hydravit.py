# Copyright 2026 The hydravit_hf authors. Licensed under the Apache License, Version 2.0.
"""Download of one image from an address that may be hostile: one deadline, one limit of bytes, checked redirects.

This file travels with each saved checkpoint as remote code.
"""

import contextlib
import http.client
import ipaddress
import socket
import threading
import urllib.request
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

MAX_BYTES = 64 * 2**20  # of one image; a larger body ends the download


def fetch(url: str, timeout: float | None) -> bytes:
    """Download `url`, http(s) only.

    Args:
        url: The address. Redirects lead to http(s) only, and never from a public address to a private one.
        timeout: Seconds for the whole download, from the name's resolution to the last byte. None waits for ever.

    Raises:
        TimeoutError: The download took longer.
        OSError: The server can't be reached or refuses, redirects to a forbidden address, or sends more than
            `MAX_BYTES`.
    """
    download = _Download(url)
    download.start()
    download.join(timeout)
    if download.is_alive():
        download.stop()
        raise TimeoutError(f"there was no whole answer within {timeout:g} seconds")
    if download.error is not None:
        raise download.error
    return download.body


class _Download(threading.Thread):
    """A download in a thread of its own, because only another thread can end a read that has no deadline."""

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.url = url
        self.body: bytes | None = None
        self.error: Exception | None = None
        self.sockets: list[socket.socket] = []
        self.stopped = False
        self.started_public: bool | None = None  # whether the first connection went to a public address

    def run(self):
        opener = urllib.request.OpenerDirector()
        handlers = [urllib.request.ProxyHandler(), urllib.request.UnknownHandler(), _Redirects()]
        handlers += [urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor()]
        for handler in [*handlers, _handler(self, "http"), _handler(self, "https")]:
            opener.add_handler(handler)
        try:
            request = urllib.request.Request(self.url, headers={"User-Agent": "hydravit_hf"})
            with opener.open(request) as response:
                body = response.read(MAX_BYTES + 1)
            if len(body) > MAX_BYTES:
                raise OSError(f"the answer has more than {MAX_BYTES // 2**20} MiB")
            if response.length:
                raise OSError(f"the answer was cut, {response.length} bytes before its end")
            self.body = body
        except HTTPError as error:
            error.close()
            self.error = OSError(f"the server answered {error.code} {error.reason}")
        except URLError as error:
            self.error = error.reason if isinstance(error.reason, OSError) else OSError(str(error.reason))
        except (http.client.HTTPException, ValueError) as error:
            self.error = OSError(f"the server's answer is no HTTP: {type(error).__name__}")
        except OSError as error:
            self.error = error
        finally:
            for connection in self.sockets:
                connection.close()

    def connected(self, connection: socket.socket):
        """Register a new connection, and refuse one that a redirect leads from a public to a private address."""
        self.sockets.append(connection)
        is_public = ipaddress.ip_address(connection.getpeername()[0].partition("%")[0]).is_global
        if self.started_public is None:
            self.started_public = is_public
        if self.stopped or (self.started_public and not is_public):
            connection.close()
            raise OSError("the server redirects to a private address")

    def stop(self):
        self.stopped = True
        for connection in self.sockets:
            with contextlib.suppress(OSError):  # it may be closed already
                connection.shutdown(socket.SHUT_RDWR)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) only, where urllib also allows ftp."""

    def redirect_request(self, request, response, code, message, headers, url):
        if urlsplit(url).scheme not in ("http", "https"):
            response.close()
            raise OSError(f"the server redirects to '{urlsplit(url).scheme}', which is not http(s)")
        return super().redirect_request(request, response, code, message, headers, url)


def _handler(download: _Download, scheme: str):
    """A handler of urllib for http or https whose connections are registered with the download."""
    base = http.client.HTTPConnection if scheme == "http" else http.client.HTTPSConnection

    class Connection(base):
        def connect(self):
            super().connect()
            download.connected(self.sock)

    if scheme == "http":

        class Handler(urllib.request.HTTPHandler):
            def http_open(self, request):
                return self.do_open(Connection, request)

    else:

        class Handler(urllib.request.HTTPSHandler):
            def https_open(self, request):
                return self.do_open(Connection, request)

    return Handler()
