"""Runs `hydravit serve` as its users run it, and a client on bare sockets that can also send what is broken."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(model, port: int, log: Path, *options, **environment) -> subprocess.Popen:
    """Start a server, and wait until it listens."""
    command = [sys.executable, "-W", "error", "-m", "hydravit_hf.cli", "serve", str(model), "--port", str(port)]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    with log.open("w") as output:
        arguments = [*command, *map(str, options)]
        process = subprocess.Popen(arguments, env=variables, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return process
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


@contextmanager
def served(model, log: Path, *options, **environment):
    """The port of a server that runs within this context."""
    port = free_port()
    process = start(model, port, log, *options, **environment)
    try:
        yield port
    finally:
        process.terminate()
        assert process.wait(60) == 0, log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()


class Client:
    """One connection, which stays open from one request to the next."""

    def __init__(self, port: int, **headers: str):
        self.port, self.headers, self.writer = port, headers, None

    async def open(self):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)

    async def send(self, data: bytes):
        if self.writer is None:
            await self.open()
        self.writer.write(data)
        await self.writer.drain()

    async def receive(self) -> tuple[int, dict[str, str], bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await self.reader.readexactly(int(headers["content-length"])) if "content-length" in headers else b""
        if headers.get("connection") == "close":
            await self.close()
        return int(head[0].split()[1]), headers, body

    async def request(self, path: str, body: bytes | None = None, method: str | None = None, **headers: str):
        """Send a request. Returns the status, the headers and what JSON the body holds."""
        lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1", "host: test"]
        headers = self.headers | headers | ({} if body is None else {"content-length": str(len(body))})
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.send("\r\n".join([*lines, "", ""]).encode() + (body or b""))
        status, answered, content = await self.receive()
        is_json = answered.get("content-type") == "application/json"
        return status, answered, json.loads(content) if is_json else content.decode()

    async def close(self):
        if self.writer is not None:
            writer, self.writer = self.writer, None
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
