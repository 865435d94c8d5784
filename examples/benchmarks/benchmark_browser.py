"""How long each width takes in headless Chromium, as a page of `hydravit export --page` measures it.

    hydravit export MODEL page --page --example IMAGE && python examples/benchmarks/benchmark_browser.py page

The processor time is that of the thread that computes. On a machine with other work, it is shorter than the page's own
time. Without a folder, the script exports a page of the default model with random weights at 3, 6 and 12 heads.
"""

import argparse
import functools
import json
import os
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from timing import machine

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, make_image_processor
from hydravit_hf.browser import export_page


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder with the headers that allow a page several threads."""

    def end_headers(self):
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        super().end_headers()

    def log_message(self, *args):
        pass


def make_page(folder: Path) -> Path:
    torch.manual_seed(0)
    model = HydraViTForImageClassification(HydraViTConfig(num_labels=1000))
    Image.new("RGB", (500, 375), (90, 120, 60)).save(folder / "image.png")
    processor = make_image_processor(model.config)
    return export_page(model, [3, 6, 12], folder / "page", processor, [folder / "image.png"])


def worker_seconds() -> float:
    """Processor seconds that the workers of browsers have taken so far, on Linux."""
    seconds = 0
    for name in Path("/proc").glob("[0-9]*/task/*/comm"):
        with suppress(OSError):  # it has ended
            if name.read_text().startswith("DedicatedWorker"):
                user, system = name.with_name("stat").read_text().rpartition(")")[2].split()[11:13]
                seconds += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return seconds


def measure(folder: Path, browser: str, rounds: int):
    """Print a table of the page's own times and of processor times, and the seconds until the page answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as starter:
        chromium = starter.chromium.launch(executable_path=browser, args=["--headless", "--no-sandbox"])
        page = chromium.new_page()
        page.set_default_timeout(600_000)
        begin = time.perf_counter()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector("#answer:not(.old) meter")
        first = time.perf_counter() - begin
        page.wait_for_selector("body[data-state=loaded]")
        loaded = time.perf_counter() - begin
        page.click("#measure")
        page.wait_for_selector("#measure:not([disabled])")
        rows = [row.split("\t") for row in page.locator("#times tr").all_inner_texts()]
        rows[0][5:] = ["processor ms"]
        for index, row in enumerate(rows[1:]):
            page.locator("#width").fill(str(index))
            page.wait_for_selector("#answer:not(.old) meter")
            before = worker_seconds()
            for _ in range(rounds):
                page.locator("#width").dispatch_event("input")
                page.wait_for_selector("#answer:not(.old) meter")
            row[5:] = [f"{1000 * (worker_seconds() - before) / rounds:.0f}"]
        print(f"{machine()}\nChromium {chromium.version}, {page.inner_text('#where')}\n")
        for number, row in enumerate(rows):
            print("|", " | ".join(row), "|")
            if number == 0:
                print("|", " | ".join(["---:"] * 6), "|")
        print(f"\nFirst answer after {first:.1f} s, every width loaded after {loaded:.1f} s")
        chromium.close()
    server.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", help="folder of a page with an example")
    parser.add_argument("--browser", default=shutil.which("chromium"), help="path of Chromium")
    parser.add_argument("--rounds", type=int, default=10, help="runs of each width that give the processor time")
    args = parser.parse_args()
    if args.page and not json.loads((args.page / "model.json").read_text())["examples"]:
        parser.error("the page has no example: export it with --example IMAGE")
    with tempfile.TemporaryDirectory() as temporary:
        measure(args.page or make_page(Path(temporary)), args.browser, args.rounds)
