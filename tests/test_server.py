"""`hydravit serve` as a process: right answers, one each, whatever else is sent; and clean ends."""

import asyncio
import base64
import io
import json
import re
import resource
import signal
import socket
import struct
import zlib
from threading import Thread
from urllib.parse import urlparse

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from support.models import make_model
from support.serving import Client, free_port, served, start

from hydravit_hf import make_image_processor
from hydravit_hf.server import bind

HEADS = [1, 3, 6]
KEY = "a secret"
OPTIONS = ("--deadline-ms", 500, "--max-body-mb", 0.2, "--timeout-s", 2)
HEADLESS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
PNG = {"content_type": "image/png"}
JSON = {"content_type": "application/json"}


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make_model(subnetwork_heads=HEADS)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    model.save_pretrained(folder)
    make_image_processor(model.config).save_pretrained(folder)
    rows = [{"num_heads": num_heads, "accuracy": 0.5 + num_heads / 100} for num_heads in HEADS]
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def pictures():
    return [png(pixels) for pixels in np.random.default_rng(0).integers(0, 256, (40, 20, 24, 3), dtype=np.uint8)]


@pytest.fixture(scope="module")
def expected(model, pictures):
    """The score of each label for (picture, number of heads), of the model alone."""
    processor = make_image_processor(model.config)
    images = [Image.open(io.BytesIO(picture)) for picture in pictures]
    inputs = torch.cat([processor(image, return_tensors="pt").pixel_values for image in images])
    scores = {}
    for num_heads in HEADS:
        with torch.inference_mode():
            rows = model(inputs, num_heads_active=num_heads).logits.softmax(-1).tolist()
        scores |= {(index, num_heads): row for index, row in enumerate(rows)}
    return {
        key: {model.config.id2label[index]: score for index, score in enumerate(row)} for key, row in scores.items()
    }


@pytest.fixture(scope="module")
def port(checkpoint, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with served(checkpoint, log, *OPTIONS, HYDRAVIT_API_KEY=KEY) as port:
        yield port
    printed = log.read_text()
    assert "| heads |" in printed and "56.00%" in printed and "deadline of 500 ms" in printed


def check(answer: dict, expected: dict, index: int, asked: int | None = None):
    assert asked in (None, answer["num_heads"])
    scores = {row["label"]: row["score"] for row in answer["predictions"]}
    assert scores == pytest.approx(expected[index, answer["num_heads"]], abs=1e-5)
    assert answer["waited_ms"] >= 0 and answer["computed_ms"] > 0


async def ask(client: Client, picture: bytes, how: int, asked: int | None = None, **fields) -> tuple[int, dict, dict]:
    """Send a picture in one of the three ways."""
    fields |= {} if asked is None else {"num_heads_active": asked}
    if how == 0:
        query = "&".join(f"{name}={value}" for name, value in fields.items())
        return await client.request(f"/predict?{query}", picture, **PNG)
    if how == 1:
        body = json.dumps({"image": base64.b64encode(picture).decode()} | fields)
        return await client.request("/predict", body.encode(), **JSON)
    parts = [f'--b\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n'.encode() for n, v in fields.items()]
    file = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + picture + b"\r\n--b--\r\n"
    return await client.request("/predict", b"".join([*parts, file]), content_type="multipart/form-data; boundary=b")


async def ask_many(port: int, pictures, expected, clients: int, each: int) -> int:
    """Ask from several clients at a time, in all ways and at all widths. Returns the number of right answers."""

    async def one(number: int) -> int:
        client, right = Client(port, x_api_key=KEY), 0
        try:
            for turn in range(each):
                index, asked = (7 * number + turn) % len(pictures), [None, None, *HEADS][(number + turn) % 5]
                status, _, answer = await ask(client, pictures[index], turn % 3, asked)
                assert status == 200, answer
                check(answer, expected, index, asked)
                right += 1
        finally:
            await client.close()
        return right

    return sum(await asyncio.gather(*(one(number) for number in range(clients))))


def count(metrics: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", metrics, flags=re.MULTILINE))


async def get(port: int, path: str) -> tuple[int, dict, dict | str]:
    client = Client(port, x_api_key=KEY)
    try:
        return await client.request(path)
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("clients", "each"), [(20, 25), pytest.param(50, 100, marks=pytest.mark.slow)], ids=["500", "5000"]
)
def test_each_answer_is_that_of_the_model_alone_and_none_is_lost(port, pictures, expected, clients, each):
    before = asyncio.run(get(port, "/metrics"))[2]
    assert asyncio.run(ask_many(port, pictures, expected, clients, each)) == clients * each
    after = asyncio.run(get(port, "/metrics"))[2]
    for name in (
        "hydravit_answers_total",
        "hydravit_latency_seconds_count",
        r"hydravit_requests_total\{status=\"200\"\}",
    ):
        assert count(after, name) - count(before, name) == clients * each, name
    assert count(after, "hydravit_in_progress") == 0 and count(after, "hydravit_queue") == 0


def bomb() -> bytes:
    """A PNG of 100 bytes that says that it has 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


GOOD = base64.b64encode(png(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))).decode()
NOISE = png(np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8))
BAD = {  # name -> path, body, content type, status, part of the reason
    "empty": ("/predict", b"", "image/png", 400, "no image"),
    "a text": ("/predict", b"not an image", "image/png", 400, "can't be read"),
    "truncated": ("/predict", NOISE[:700], "image/png", 400, "can't be read"),
    "a bomb": ("/predict", bomb(), "image/png", 400, "3600000000 pixels"),
    "another type": ("/predict", b"<html>", "text/html", 415, "text/html"),
    "huge": ("/predict", b"x" * 300_000, "image/png", 413, "at most 0.2 MB"),
    "no JSON": ("/predict", b"{image", "application/json", 400, "not JSON"),
    "no text": ("/predict", b"\xff\xfe\x00", "application/json", 400, "not JSON"),
    "deep": ("/predict", b"[" * 50_000, "application/json", 400, "not JSON"),
    "a list": ("/predict", b"[1]", "application/json", 400, "JSON object"),
    "no image": ("/predict", b'{"top_k": 1}', "application/json", 400, "no image"),
    "a number": ("/predict", b'{"image": 7}', "application/json", 400, "string in base64"),
    "no base64": ("/predict", b'{"image": "/etc/passwd"}', "application/json", 400, "not valid base64"),
    "a path": ("/predict", b'{"image": "/etc/hostname1234"}', "application/json", 400, "can't be read|base64"),
    "a URL": ("/predict", b'{"image": "http://127.0.0.1/a.png"}', "application/json", 400, "downloads no images"),
    "another field": (
        "/predict",
        b'{"image": "%s", "deadline": 1}',
        "application/json",
        400,
        "Unknown fields: deadline",
    ),
    "negative": ("/predict", b'{"image": "%s", "deadline_ms": -1}', "application/json", 400, "deadline_ms.*-1"),
    "NaN": ("/predict", b'{"image": "%s", "deadline_ms": NaN}', "application/json", 400, "deadline_ms.*nan"),
    "infinite": ("/predict", b'{"image": "%s", "deadline_ms": 1e999}', "application/json", 400, "deadline_ms.*inf"),
    "endless": (
        "/predict",
        b'{"image": "%s", "deadline_ms": 1' + b"0" * 400 + b"}",
        "application/json",
        400,
        "deadline_ms",
    ),
    "a word": ("/predict?deadline_ms=soon", base64.b64decode(GOOD), "image/png", 400, "deadline_ms.*soon"),
    "unknown width": ("/predict?num_heads_active=2", base64.b64decode(GOOD), "image/png", 400, r"one of \[1, 3, 6\]"),
    "half a head": ("/predict", b'{"image": "%s", "num_heads_active": 3.5}', "application/json", 400, "3.5"),
    "true": ("/predict", b'{"image": "%s", "num_heads_active": true}', "application/json", 400, "True"),
    "no labels": ("/predict?top_k=0", base64.b64decode(GOOD), "image/png", 400, "top_k.*positive"),
    "no boundary": ("/predict", b"--b", "multipart/form-data", 400, "boundary"),
    "an empty form": ("/predict", b"--b--\r\n", "multipart/form-data; boundary=b", 400, "no image"),
    "no such page": ("/classify", b"x", "image/png", 404, "Not Found"),
    "another method": ("/info", b"x", "image/png", 405, "Not Allowed"),
}


def test_bad_requests_get_a_reason_and_others_are_unharmed(port, pictures, expected):
    async def send_all():
        client, good = Client(port, x_api_key=KEY), Client(port, authorization=f"Bearer {KEY}")
        for name, (path, body, kind, status, reason) in BAD.items():
            body = body.replace(b"%s", GOOD.encode())
            given, _, answer = await client.request(path, body, content_type=kind)
            assert given == status and re.search(reason, answer["detail"]), (name, given, answer)
            await client.close()  # a large body may be left unread
            given, _, answer = await ask(good, pictures[0], 0)
            assert given == 200, name
            check(answer, expected, 0)
        for headers in ({}, {"x_api_key": "wrong"}, {"authorization": "Bearer wr\xf6ng"}):
            for path, body in (("/predict", pictures[0]), ("/info", None), ("/metrics", None), ("/stats", None)):
                client = Client(port, **headers)
                status, answered, answer = await client.request(path, body)
                assert status == 401 and "Bearer KEY" in answer["detail"] and "www-authenticate" in answered
                await client.close()
        assert (await get(port, "/health"))[::2] == (200, {"status": "ok"})
        await good.close()

    asyncio.run(send_all())


def test_broken_and_slow_connections_end_and_others_are_unharmed(port, pictures, expected):
    head = b"POST /predict HTTP/1.1\r\nhost: test\r\nx-api-key: a secret\r\ncontent-type: image/png\r\n"

    async def status_of(data: bytes, then_close: bool = False) -> int | None:
        client = Client(port)
        await client.send(data)
        if then_close:
            return await client.close()
        status, _, body = await asyncio.wait_for(client.receive(), 20)
        assert body and await asyncio.wait_for(client.reader.read(), 20) == b""  # the server closes the connection
        await client.close()
        return status

    async def pause_between_requests() -> int:
        """One connection that is in use for longer than a request may take to arrive."""
        client = Client(port, x_api_key=KEY)
        for turn in range(12):
            assert (await ask(client, pictures[0], turn % 3))[0] == 200
            await asyncio.sleep(0.25)
        await client.close()
        return 200

    async def check_all():
        slow = [
            pause_between_requests(),
            status_of(b"GET /health HTTP/1.1\r\nhost: te"),  # the rest of the head never comes
            status_of(b""),  # nothing ever comes
            status_of(head + b"content-length: 100\r\n\r\nabc"),  # the rest of the body never comes
        ]
        chunks = b"".join(b"8000\r\n" + b"x" * 0x8000 + b"\r\n" for _ in range(10))
        many = ask_many(port, pictures, expected, 5, 40)
        waits = asyncio.gather(*slow, status_of(b"no HTTP at all\r\n\r\n"), many)
        await status_of(head + b"content-length: 100\r\n\r\nabc", then_close=True)
        client = Client(port)
        await client.send(head + b"transfer-encoding: chunked\r\n\r\n" + chunks)
        assert (await client.receive())[0] == 413
        await client.close()
        assert await waits == [200, 408, 408, 408, 400, 200]

    asyncio.run(check_all())


def test_many_open_connections_leave_room_for_others(port, pictures, expected):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(10_000, hard - 500)

    async def check_all():
        writers = []
        for _ in range(count // 500):
            opened = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(500)))
            writers += [writer for _, writer in opened]
        assert await ask_many(port, pictures, expected, 5, 20) == 100
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
        assert await ask_many(port, pictures, expected, 1, 3) == 3

    try:
        asyncio.run(check_all())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_page_shows_the_load_and_answers_an_image_in_a_browser(port, pictures, expected, browser, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    (tmp_path / "picture.png").write_bytes(pictures[0])
    (tmp_path / "text.png").write_text("not an image")
    errors, hosts = [], set()
    with playwright.sync_playwright() as starter:
        chromium = starter.chromium.launch(executable_path=browser, args=HEADLESS)
        page = chromium.new_page(viewport={"width": 1000, "height": 900})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: hosts.add(urlparse(request.url).hostname))
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_label("API key").fill(KEY)  # the field appears as the server wants one
        playwright.expect(page.get_by_label("Heads").locator("option")).to_have_count(1 + len(HEADS))
        playwright.expect(page.locator("#model")).to_have_text("tiny")
        playwright.expect(page.locator("#deadline")).to_have_text("500 ms")

        page.get_by_label("Image").set_input_files(tmp_path / "text.png")
        page.get_by_role("button", name="Classify").click()
        playwright.expect(page.locator("#answer .error")).to_contain_text("can't be read")

        page.get_by_label("Image").set_input_files(tmp_path / "picture.png")
        for num_heads in HEADS:
            page.get_by_label("Heads").select_option(str(num_heads))
            page.get_by_role("button", name="Classify").click()
            playwright.expect(page.locator("#answer")).to_contain_text(
                f"{num_heads} head{'s' * (num_heads > 1)}, waited"
            )
            rows = page.locator("#answer tr").all_inner_texts()
            right = sorted(expected[0, num_heads].items(), key=lambda item: -item[1])
            shown = [text.split("\t") for text in rows]
            assert [(row[0], row[-1]) for row in shown] == [(label, f"{100 * score:.1f} %") for label, score in right]

        load = Thread(target=asyncio.run, args=(ask_many(port, pictures, expected, 5, 60),))
        load.start()
        for num_heads in HEADS:
            playwright.expect(page.locator(f"#load rect[data-heads='{num_heads}']").first).to_be_attached()
        load.join()
        playwright.expect(page.locator("#met")).to_contain_text("%")
        page.screenshot(path=tmp_path / "page.png")
        page.set_viewport_size({"width": 420, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= 420
        chromium.close()
    assert errors == [] and hosts - {None} == {"127.0.0.1"}  # None has the picture itself


def test_info_tells_what_each_width_costs_and_how_good_it_is(port, model):
    status, _, info = asyncio.run(get(port, "/info"))
    assert status == 200 and info["model"] == "tiny" and info["deadline_ms"] == 500
    assert [row["num_heads"] for row in info["widths"]] == HEADS
    assert [row["accuracy"] for row in info["widths"]] == [0.51, 0.53, 0.56]
    assert [row["macs"] for row in info["widths"]] == [model.config.count_macs(num_heads) for num_heads in HEADS]
    assert all(row["latency_ms"] > 0 for row in info["widths"]) and len(info["latencies"]) >= len(HEADS)


def test_sigterm_under_load_answers_all_that_was_accepted(checkpoint, pictures, expected, tmp_path):
    """Each client sends until an answer asks it to close the connection. None of its requests is lost."""
    port, log = free_port(), tmp_path / "log.txt"
    process = start(checkpoint, port, log, "--deadline-ms", 500)

    async def one(number: int) -> int:
        client = Client(port)
        for turn in range(100_000):
            index = (number + turn) % len(pictures)
            status, headers, answer = await ask(client, pictures[index], turn % 3)
            assert status == 200
            check(answer, expected, index)
            if headers.get("connection") == "close":
                return turn + 1
        raise AssertionError("the server never asked to close a connection")

    async def check_all():
        clients = asyncio.gather(*(one(number) for number in range(30)))
        await asyncio.sleep(1)
        process.send_signal(signal.SIGTERM)
        return await clients

    assert min(asyncio.run(check_all())) > 1
    assert process.wait(30) == 0, log.read_text()
    assert "Traceback" not in log.read_text()


def test_after_kill_9_nothing_is_left_and_the_next_start_is_clean(checkpoint, pictures, expected, tmp_path):
    port, log = free_port(), tmp_path / "log.txt"
    process = start(checkpoint, port, log)

    async def load():
        ends = (ask_many(port, pictures, expected, 1, 10_000) for _ in range(5))
        return await asyncio.gather(*ends, return_exceptions=True)

    async def kill_under_load():
        clients = asyncio.ensure_future(load())
        await asyncio.sleep(0.5)
        assert not psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert all(isinstance(end, (OSError, asyncio.IncompleteReadError)) for end in await clients)

    asyncio.run(kill_under_load())
    assert process.wait(30) == -signal.SIGKILL
    again = start(checkpoint, port, log)
    assert asyncio.run(ask_many(port, pictures, expected, 2, 5)) == 10
    again.send_signal(signal.SIGINT)
    assert again.wait(30) == 0, log.read_text()


def test_a_full_queue_answers_503_with_a_time_to_wait(checkpoint, pictures, tmp_path):
    with served(checkpoint, tmp_path / "log.txt", "--max-queue", 2, "--late", "refuse") as port:

        async def check_all():
            busy = [Client(port) for _ in range(2)]
            for client in busy:  # their bodies are on the way
                await client.send(b"POST /predict HTTP/1.1\r\nhost: test\r\ncontent-length: 100\r\n\r\n")
            client, full = Client(port), None
            for _ in range(100):
                full = await ask(client, pictures[0], 0)
                if full[0] == 503:
                    break
            assert full[0] == 503 and full[1]["retry-after"] == "1" and "2 requests" in full[2]["detail"]
            for other in busy:
                await other.close()
            while (answer := await ask(client, pictures[0], 0))[0] == 503:
                await asyncio.sleep(0.05)
            assert answer[0] == 200
            late = await ask(client, pictures[0], 0, deadline_ms=0.01)
            assert late[0] == 503 and "deadline" in late[2]["detail"] and late[1]["retry-after"] == "1"
            await client.close()

        asyncio.run(check_all())


def test_a_start_that_can_not_succeed_says_why_in_one_line(hydravit, checkpoint):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, out, err = hydravit("serve", checkpoint, "--port", taken.getsockname()[1])
    assert code == 1 and "can't be used" in err and not out
    code, _, err = hydravit("serve", checkpoint, "--port", free_port(), "--heads", 9)
    assert code == 1 and err.count("\n") == 1 and "9" in err
    code, _, err = hydravit("serve", checkpoint, "--port", free_port(), "--runtime", "tensorrt")
    assert code == 2 and all(name in err for name in ("--runtime", "torch", "openvino", "onnx"))
    code, _, err = hydravit("serve", checkpoint, "--port", free_port(), "--deadline-ms", "nan")
    assert code in (1, 2) and "deadline" in err


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_answer_does_not_wait_until_the_client_has_acknowledged_its_head(host):
    """asyncio sets TCP_NODELAY only on a socket that names its protocol."""

    async def accepted() -> int:
        found = asyncio.get_running_loop().create_future()

        def note(reader, writer):
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        bound = bind(host, 0)
        async with await asyncio.start_server(note, sock=bound):
            _, writer = await asyncio.open_connection(*bound.getsockname()[:2])
            writer.close()
            return await found

    assert asyncio.run(accepted())
