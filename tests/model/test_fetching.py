"""A download ends in an image or in one error, within its time and memory, whatever the server does."""

import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hydravit_hf.model import fetching_hydravit
from hydravit_hf.model.fetching_hydravit import _Download, fetch


class Handler(BaseHTTPRequestHandler):
    """Answers each path in a way of its own."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        with contextlib.suppress(OSError):  # the client may have gone
            getattr(self, self.path.strip("/").replace("-", "_"))()

    def answer(self, body: bytes = b"", status: int = 200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def whole(self):
        self.answer(b"image")

    def missing(self):
        self.answer(b"no", 404)

    def redirect(self):
        self.answer(status=302, Location="/whole")

    def redirect_for_ever(self):
        self.answer(status=302, Location=self.path)

    def redirect_to_ftp(self):
        self.answer(status=302, Location="ftp://127.0.0.1/image.png")

    def redirect_to_a_file(self):
        self.answer(status=302, Location="file:///etc/hostname")

    def drip(self):
        self.answer()
        while True:
            self.wfile.write(b"x")
            time.sleep(0.1)

    def drip_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            self.wfile.write(b"X")
            time.sleep(0.1)

    def silence(self):
        time.sleep(20)

    def endless(self):
        self.answer()
        while True:
            self.wfile.write(bytes(2**20))

    def cut(self):
        self.answer(b"half", **{"Content-Length": "1000"})

    def no_http(self):
        self.wfile.write(b"220 welcome\r\n")


@pytest.fixture
def server(monkeypatch):
    """The address of a server on the loopback."""
    monkeypatch.setenv("no_proxy", "*")
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


@pytest.mark.parametrize("path", ["whole", "redirect"])
def test_an_answer_is_the_body_also_after_a_redirect(server, path):
    assert fetch(f"{server}/{path}", timeout=10) == b"image"


@pytest.mark.parametrize("path", ["drip", "drip-headers", "silence"])
def test_a_slow_server_ends_at_the_deadline_and_its_connection_is_closed(server, path):
    start, threads = time.monotonic(), threading.active_count()
    with pytest.raises(TimeoutError, match=r"no whole answer within 0\.5 seconds"):
        fetch(f"{server}/{path}", timeout=0.5)
    assert time.monotonic() - start < 1.5
    deadline = time.monotonic() + 10
    while threading.active_count() > threads + 1:  # the server's own thread may sleep on
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_host_that_never_answers_ends_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=0.5)
        assert time.monotonic() - start < 1.5


def test_an_endless_body_ends_at_the_limit_of_bytes(server, monkeypatch):
    monkeypatch.setattr(fetching_hydravit, "MAX_BYTES", 3 * 2**20)
    with pytest.raises(OSError, match="more than 3 MiB"):
        fetch(f"{server}/endless", timeout=30)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "answered 404"),
        ("redirect-to-ftp", "redirects to 'ftp'"),
        ("redirect-to-a-file", "answered 302"),
        ("redirect-for-ever", "answered 302"),
        ("cut", "996 bytes before its end"),
        ("no-http", "no HTTP"),
    ],
)
def test_every_other_failure_is_one_error(server, path, message):
    with pytest.raises(OSError, match=message):
        fetch(f"{server}/{path}", timeout=10)


def test_a_port_where_no_one_listens_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        fetch(f"http://127.0.0.1:{port}/", timeout=10)


def test_a_redirect_from_a_public_address_to_a_private_one_is_refused(server):
    download = _Download(f"{server}/whole")
    download.started_public = True  # as after a first answer from the internet, which a test can't have
    download.run()
    assert download.body is None and "private address" in str(download.error)


def test_an_https_address_of_a_server_without_tls_is_an_error(server):
    with pytest.raises(OSError, match=r"(?i)ssl"):
        fetch(server.replace("http:", "https:") + "/whole", timeout=10)
