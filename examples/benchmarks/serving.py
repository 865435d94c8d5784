"""What is a width that follows the load worth? Traces of requests against `hydravit serve`, on a CPU.

    pip install -c constraints.txt -e ".[train,serve]"
    python examples/benchmarks/serving.py --data /usr/share/datasets/fashion-mnist --folder runs/serving
    python examples/benchmarks/serving.py --report      # the tables and the plot of the results, without a run

The data are the idx files of Fashion-MNIST, as Debian's package `dataset-fashion-mnist` has them. The first run trains
a model of 12 heads x 32 channels and 6 layers. A server runs for each fixed width and one for all widths, all at the
same time. In each round, every trace plays against each server in turns. The client sends each request at its time,
whether the earlier ones were answered or not. It counts an answer as on time by its own clock. The server has one core,
and the client another one. Results are added to a file; rounds in the file are not repeated.
"""

import argparse
import asyncio
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import aiohttp
import numpy as np
import torch
from fashion_mnist import FOLDER, Flipped, accuracies, load
from PIL import Image
from timing import RESULTS, append_rows, format_rows, machine, read_rows
from tqdm import tqdm

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, make_image_processor
from hydravit_hf.serving import Latencies, Request, Scheduler, replay

PLOT = Path(__file__).parents[2] / "docs" / "serving.png"
HEADS = [2, 6, 12]
CLASSES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
DEADLINE_MS = 100
SECONDS = 15  # of a trace
IMAGES = 2000  # test images that the client sends
# The part of the capacity of the widest that arrives at a second; a neighbour takes the core of the server meanwhile
NEIGHBOUR = (SECONDS / 3, SECONDS * 2 / 3)
BURST_MEAN, BURST_SECONDS, BURST_EVERY = 0.4, 0.4, 5.0
TRACES = {
    "steady": lambda second: 0.5,
    "ramp": lambda second: 0.25 + 3.75 * second / SECONDS,
    "bursts": lambda second: (
        10 * BURST_MEAN
        if second % BURST_EVERY >= BURST_EVERY - BURST_SECONDS
        else BURST_MEAN * (BURST_EVERY - 10 * BURST_SECONDS) / (BURST_EVERY - BURST_SECONDS)
    ),
    "neighbour": lambda second: 0.5,
}
BUSY = f"import time; end = time.monotonic() + {SECONDS}\nwhile time.monotonic() < end: pass"  # ends by itself, too
SCHEDULER = "scheduler"
BUCKET_MS = 10  # times that SlackFit does not tell apart
OVERLOAD = 1.5
BIN = 0.5  # seconds of a point of the plot
STEPS = 1600  # of the training, in batches of 32


# --- The model ---


def train(data: dict, folder: Path):
    """Train the model that is served, in half an hour of a core."""
    from transformers import set_seed

    from hydravit_hf import HydraViTTrainer, HydraViTTrainingArguments

    set_seed(0)
    config = HydraViTConfig(
        num_attention_heads=12,
        head_dim=32,
        num_hidden_layers=6,
        image_size=28,
        patch_size=4,
        num_channels=1,
        subnetwork_heads=[2, 4, 6, 12],
        subnetwork_weights=[1, 1, 1, 2],
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    model = HydraViTForImageClassification(config)
    arguments = HydraViTTrainingArguments(
        folder,
        per_device_train_batch_size=32,
        max_steps=STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=150,
        weight_decay=0.05,
        bf16=True,
        use_cpu=True,
        seed=0,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        write_model_card=False,
    )
    HydraViTTrainer(model, arguments, train_dataset=Flipped(*data["train"])).train()
    model.save_pretrained(folder)
    make_image_processor(model.config).save_pretrained(folder)


def evaluate(folder: Path, images: torch.Tensor, labels: torch.Tensor):
    """Write results.json, which `/info` shows: the accuracy of each width on the images that are sent."""
    model = HydraViTForImageClassification.from_pretrained(folder)
    scores = accuracies(model, images, labels, HEADS)
    rows = [{"num_heads": k, "accuracy": accuracy} for k, accuracy in zip(HEADS, scores, strict=True)]
    (folder / "results.json").write_text(json.dumps(rows))


def to_png(image: torch.Tensor) -> bytes:
    """The file of an image from -1 to 1, (1, H, W)."""
    file = io.BytesIO()
    Image.fromarray(((image[0] + 1) * 127.5).round().byte().numpy()).save(file, "PNG")
    return file.getvalue()


# --- Servers, traces and the client ---


@contextmanager
def served(folder: Path, heads: list[int], core: int | None):
    """The process of a server and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hydravit_hf.cli", "serve", str(folder), "--port", str(port)]
    command += ["--deadline-ms", str(DEADLINE_MS), "--max-queue", "100000"]
    command += [option for num_heads in heads for option in ("--heads", str(num_heads))]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL)
    try:
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        while process.poll() is None and not listens(port):
            time.sleep(0.1)
        if process.poll() is not None:
            raise RuntimeError(f"The server of {heads} heads did not start.")
        yield process, port
    finally:
        process.terminate()
        process.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def neighbour(core: int | None):
    """A process that takes a core."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        yield
    finally:
        process.kill()
        process.wait()


def arrivals(rate, capacity: float, seed: int) -> list[float]:
    """The seconds at which requests arrive: a Poisson process whose rate is a part of the capacity."""
    draw, second, found = random.Random(seed), 0.0, []
    most = capacity * max(rate(0.05 * step) for step in range(round(SECONDS / 0.05)))
    while (second := second + draw.expovariate(most)) < SECONDS:
        if draw.random() * most < capacity * rate(second):
            found.append(second)
    return found


async def play(port: int, times: list[float], images: list[bytes], labels: list[int], seed: int, core, busy: bool):
    """Send an image at each of the times. Returns a dict for each request."""
    draw, rows, start = random.Random(seed), [], time.perf_counter() + 0.2
    address, headers = f"http://127.0.0.1:{port}/predict?top_k=1", {"Content-Type": "image/png"}
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def send(second: float, index: int):
            sent = time.perf_counter()
            async with session.post(address, data=images[index], headers=headers) as response:
                answer = await response.json()
            ms = 1e3 * (time.perf_counter() - sent)
            is_right = answer["predictions"][0]["label"] == CLASSES[labels[index]]
            rows.append({"second": second, "ms": ms, "num_heads": answer["num_heads"], "is_right": is_right})

        async def disturb():
            await asyncio.sleep(NEIGHBOUR[0])
            with neighbour(core):
                await asyncio.sleep(NEIGHBOUR[1] - NEIGHBOUR[0])

        tasks = [asyncio.create_task(disturb())] if busy else []
        for second in times:
            await asyncio.sleep(max(0, start + second - time.perf_counter()))
            tasks.append(asyncio.create_task(send(second, draw.randrange(len(images)))))
        await asyncio.gather(*tasks)
    return rows


def summarise(requests: list[dict]) -> dict:
    """The figures of a trace, and its course in steps of `BIN` seconds."""
    milliseconds = [request["ms"] for request in requests]
    on_time = [request["ms"] <= DEADLINE_MS for request in requests]
    right = [request["is_right"] for request in requests]
    course = [{"requests": 0, "missed": 0} for _ in range(round(SECONDS / BIN))]
    for request, met in zip(requests, on_time, strict=True):
        step, name = course[int(request["second"] / BIN)], str(request["num_heads"])
        step["requests"] += 1
        step["missed"] += not met
        step[name] = step.get(name, 0) + 1
    return {
        "requests": len(requests),
        "met": statistics.mean(on_time),
        "effective_accuracy": statistics.mean(a and b for a, b in zip(on_time, right, strict=True)),
        "accuracy": statistics.mean(right),
        "p50_ms": float(np.percentile(milliseconds, 50)),
        "p99_ms": float(np.percentile(milliseconds, 99)),
        "course": course,
    }


def peak_mb(process: subprocess.Popen) -> float:
    """The most memory that a process has held, in MB (1e6 bytes)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


# --- What it measures ---


def run_rounds(args, images: list[bytes], labels: list[int]):
    """Play each trace against each server, in rounds."""
    done = {(row["round"], row["trace"], row["server"]) for row in read_rows(args.results) if "trace" in row}
    cores = sorted(os.sched_getaffinity(0))
    server_core, client_core = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
    arms = {str(num_heads): [num_heads] for num_heads in HEADS} | {SCHEDULER: HEADS}
    if client_core is not None:
        os.sched_setaffinity(0, {client_core})
    with served_all(args.folder, arms, server_core) as servers:
        capacity = args.capacity or measure_capacity(servers[str(HEADS[-1])][1], images)
        print(f"The widest answers {capacity:.1f} requests a second")
        for turn in range(args.first_round, args.first_round + args.rounds):
            order = [(trace, arm) for trace in args.traces for arm in arms]
            random.Random(turn).shuffle(order)
            for trace, arm in tqdm(order, desc=f"Round {turn}", leave=False):
                if (turn, trace, arm) in done:
                    continue
                process, port = servers[arm]
                times, busy = arrivals(TRACES[trace], capacity, turn), trace == "neighbour"
                requests = asyncio.run(play(port, times, images, labels, turn, server_core, busy))
                row = {"round": turn, "trace": trace, "server": arm, "capacity": capacity, "machine": machine()}
                append_rows(args.results, [row | summarise(requests) | {"peak_mb": peak_mb(process)}])


@contextmanager
def served_all(folder: Path, arms: dict[str, list[int]], core: int | None):
    """A server for each arm. They wait while another one is asked."""
    with ExitStack() as stack:
        yield {arm: stack.enter_context(served(folder, heads, core)) for arm, heads in arms.items()}


def measure_capacity(port: int, images: list[bytes], seconds: float = 5.0, clients: int = 32) -> float:
    """Answers per second to clients of which each sends its next request after an answer."""

    async def ask() -> float:
        async with aiohttp.ClientSession() as session:
            end, answers = time.perf_counter() + seconds, 0

            async def client(number: int):
                nonlocal answers
                while time.perf_counter() < end:
                    body, kind = images[number], {"Content-Type": "image/png"}
                    async with session.post(f"http://127.0.0.1:{port}/predict", data=body, headers=kind) as response:
                        await response.read()
                    answers += 1

            start = time.perf_counter()
            await asyncio.gather(*(client(number) for number in range(clients)))
            return answers / (time.perf_counter() - start)

    return asyncio.run(ask())


def measure_overheads(args, images: list[bytes]):
    """What the server adds to the model: to a lone request and to full batches, and the time of a decision."""
    from hydravit_hf.engine import Engine

    torch.set_num_threads(1)
    model = HydraViTForImageClassification.from_pretrained(args.folder)
    engine = Engine(model, make_image_processor(model.config), HEADS, DEADLINE_MS)
    accuracies = json.loads((args.folder / "results.json").read_text())
    append_rows(args.results, [{"measure": "latencies", "rows": engine.rows, "accuracies": accuracies}])
    inputs = torch.cat([engine.prepare(image) for image in images[:16]])
    engine.close()
    latencies = Latencies(engine.rows)
    for num_heads in HEADS:
        size = min(len(inputs), latencies.largest(num_heads))  # of the largest batch that the server runs
        with served(args.folder, [num_heads], None) as (_, port), torch.inference_mode():
            rows = asyncio.run(ask_alone(port, images[0], 200))
            pairs = []
            for _ in range(args.rounds):
                start = time.perf_counter()
                passes = max(4, round(2000 / (num_heads * size)))
                for _ in range(passes):
                    model(inputs[:size], num_heads_active=num_heads)
                bare = size * passes / (time.perf_counter() - start)
                pairs.append((measure_capacity(port, images, 3.0, 48), bare))
        row = {"measure": "server", "num_heads": num_heads, "batch_size": size, "machine": machine()}
        row["added_ms"] = statistics.median(total - computed for total, computed in rows)
        row["throughput"], row["bare"] = (statistics.median(column) for column in zip(*pairs, strict=True))
        row["ratio"] = statistics.median(served / bare for served, bare in pairs)
        append_rows(args.results, [row])
    for waiting in (1, 10, 100, 1000):
        times = []
        for _ in range(200):
            scheduler = Scheduler(Latencies(engine.rows))
            for number in range(waiting):
                scheduler.add(Request(0, DEADLINE_MS + number))
            start = time.thread_time()
            scheduler.next_batch(0)
            times.append(1e3 * (time.thread_time() - start))
        row = {"measure": "decision", "waiting": waiting, "p50_ms": statistics.median(times)}
        append_rows(args.results, [row | {"p99_ms": float(np.percentile(times, 99))}])


async def ask_alone(port: int, image: bytes, count: int) -> list[tuple[float, float]]:
    """The milliseconds of lone requests, and those of their batches."""
    rows = []
    async with aiohttp.ClientSession() as session:
        for _ in range(count):
            start = time.perf_counter()
            url, headers = f"http://127.0.0.1:{port}/predict", {"Content-Type": "image/png"}
            async with session.post(url, data=image, headers=headers) as response:
                answer = await response.json()
            rows.append((1e3 * (time.perf_counter() - start), answer["computed_ms"]))
    return rows[count // 10 :]


# --- Other rules, on a simulated clock ---


class SlackFit(Scheduler):
    """The rule of SuperServe: the batch that takes the most of the time that the most urgent request has. Of those that
    take about as long, it is the largest, and then the widest."""

    def _choose(self, asked: int | None, now: float) -> tuple[int, slice]:
        queue = self._waiting[asked]
        slack, best = queue[0][0] - now - self.reserve_ms, (0, 1, self.heads[0])
        for num_heads in self.heads:
            for size in range(1, min(len(queue), self.latencies.largest(num_heads)) + 1):
                ms = self.latencies(num_heads, size)
                if ms <= slack:
                    best = max(best, (int(ms / BUCKET_MS), size, num_heads))
        return best[2], slice(0, best[1])


def simulate(rows: list[dict]) -> list[dict]:
    """Effective accuracy of each rule on the traces, with the times and accuracies that were measured. The neighbour
    doubles the times. One more trace has `OVERLOAD` times as many requests as the narrowest can answer."""
    measured = [row for row in rows if row.get("measure") == "latencies"]
    capacity = next((row["capacity"] for row in rows if "capacity" in row), None)
    if not measured or capacity is None:
        return []
    latencies = Latencies(measured[-1]["rows"])
    accuracies = {row["num_heads"]: row["accuracy"] for row in measured[-1]["accuracies"]}
    largest = latencies.largest(latencies.heads[0])
    overload = OVERLOAD * 1e3 * largest / latencies(latencies.heads[0], largest) / capacity
    found, (start, end) = [], (1e3 * second for second in NEIGHBOUR)
    for name, rule in {"all requests (`hydravit serve`)": Scheduler, "the most urgent (SlackFit)": SlackFit}.items():
        found.append({"rule": name})
        for trace, rate in (TRACES | {"overload": lambda second: overload}).items():
            times = [1e3 * second for second in arrivals(rate, capacity, 0)]

            def took(num_heads: int, size: int, now: float, busy: bool = trace == "neighbour") -> float:
                return latencies(num_heads, size) * (2 if busy and start <= now < end else 1)

            scheduler = rule(Latencies(measured[-1]["rows"]), reserve_ms=0.05 * DEADLINE_MS)
            ends = replay(scheduler, [Request(time, time + DEADLINE_MS) for time in times], took)
            right = sum(accuracies[row["num_heads"]] for row in ends if row["is_on_time"])
            found[-1] |= {
                trace: 100 * right / len(ends),
                f"{trace} met": 100 * statistics.mean(r["is_on_time"] for r in ends),
            }
    return found


# --- The report ---


def gather(rows: list[dict]) -> list[dict]:
    """Means over the rounds, a row for each trace and server."""
    found = {}
    for row in rows:
        if "trace" in row:
            found.setdefault((row["trace"], row["server"]), []).append(row)
    order = [*map(str, HEADS), SCHEDULER]
    names = ("met", "effective_accuracy", "accuracy")
    return [
        {"trace": trace, "server": server if server == SCHEDULER else f"{server} heads", "rounds": len(group)}
        | {name: 100 * statistics.mean(row[name] for row in group) for name in names}
        | {name: statistics.mean(row[name] for row in group) for name in ("p50_ms", "p99_ms")}
        | {"peak_mb": max(row["peak_mb"] for row in group)}
        for (trace, server), group in sorted(
            found.items(), key=lambda item: (list(TRACES).index(item[0][0]), order.index(item[0][1]))
        )
    ]


def gather_overheads(rows: list[dict]) -> list[dict]:
    """What the server adds, a row for each width."""
    return [row for row in rows if row.get("measure") == "server"]


COLUMNS = {
    "trace": ("trace", ""),
    "server": ("server", ""),
    "met": ("deadlines met, %", ".1f"),
    "effective_accuracy": ("effective accuracy, %", ".2f"),
    "accuracy": ("accuracy of answers, %", ".2f"),
    "p50_ms": ("p50, ms", ".0f"),
    "p99_ms": ("p99, ms", ".0f"),
    "peak_mb": ("memory, MB", ".0f"),
}
OVERHEAD_COLUMNS = {
    "num_heads": ("heads", ""),
    "batch_size": ("batch", ""),
    "added_ms": ("added to a lone request, ms", ".2f"),
    "throughput": ("answers a second", ".1f"),
    "bare": ("images a second of a bare loop", ".1f"),
    "ratio": ("ratio", ".2f"),
}
CAPACITY = f"what {HEADS[-1]} heads can answer"
SIMULATED_COLUMNS = {"rule": ("looks at", "")} | {trace: (trace, ".2f") for trace in (*TRACES, "overload")}


def plot(rows: list[dict], path: Path):
    """Load, widths and misses over the time of a trace, of the scheduler in the first round."""
    from matplotlib.figure import Figure

    colours = dict(zip(map(str, HEADS), ("#c7d2fe", "#818cf8", "#3730a3"), strict=True))
    chosen = {}
    for row in rows:
        if row.get("server") in (SCHEDULER, str(HEADS[-1])):
            chosen.setdefault((row["trace"], row["server"]), row)
    shown = [trace for trace in TRACES if (trace, SCHEDULER) in chosen]
    figure = Figure(figsize=(3.6 * len(shown), 5), dpi=150, layout="constrained")
    axes = figure.subplots(2, len(shown), sharex=True, squeeze=False, height_ratios=(2, 1))
    for (above, below), trace in zip(axes.T, shown, strict=True):
        course = chosen[trace, SCHEDULER]["course"]
        seconds = BIN * np.arange(len(course))
        bottom = np.zeros(len(course))
        for num_heads, colour in colours.items():
            answers = np.array([step.get(num_heads, 0) for step in course]) / BIN
            above.bar(seconds, answers, BIN, bottom, align="edge", color=colour, label=f"{num_heads} heads")
            bottom += answers
        above.axhline(
            chosen[trace, SCHEDULER]["capacity"], color="#d97706", linestyle="--", linewidth=1, label=CAPACITY
        )
        above.set_title(trace)
        for server, colour in ((str(HEADS[-1]), "#d97706"), (SCHEDULER, "#4338ca")):
            if (trace, server) in chosen:
                course = chosen[trace, server]["course"]
                missed = [100 * step["missed"] / max(step["requests"], 1) for step in course]
                label = "scheduler" if server == SCHEDULER else f"{server} heads always"
                below.plot(seconds + BIN / 2, missed, color=colour, label=label)
        below.set(ylim=(-4, 104), xlabel="seconds")
        if trace == "neighbour":
            for each in (above, below):
                each.axvspan(*NEIGHBOUR, color="0.92", zorder=0)
            above.set_title("neighbour (grey: it takes the core)")
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("requests a second")
    axes[1, 0].set_ylabel("missed, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    lines, names = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles + lines, labels + names, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FOLDER, help="idx files")
    parser.add_argument("--folder", type=Path, default=Path("runs/serving"), help="folder of the model")
    parser.add_argument("--results", type=Path, default=RESULTS / "serving.jsonl", help="file of the results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first_round", type=int, default=0, help="number of the first round")
    parser.add_argument("--traces", nargs="+", default=list(TRACES), choices=list(TRACES), metavar="TRACE")
    parser.add_argument("--capacity", type=float, help="requests a second of the widest; default: measured")
    parser.add_argument("--overheads", action="store_true", help="measure what the server adds, in place of the traces")
    parser.add_argument("--plot", type=Path, default=PLOT, help="file of the plot")
    parser.add_argument("--report", action="store_true", help="run nothing, report the results")
    return parser


def main():
    args = make_parser().parse_args()
    if not args.report:
        data = load(args.data)
        if not (args.folder / "config.json").exists():
            train(data, args.folder)
        pixels, labels = (part[:IMAGES] for part in data["test"])
        if not (args.folder / "results.json").exists():
            evaluate(args.folder, pixels, labels)
        images = [to_png(image) for image in pixels]
        if args.overheads:
            measure_overheads(args, images)
        else:
            run_rounds(args, images, labels.tolist())
    rows = read_rows(args.results)
    print(format_rows(gather(rows), COLUMNS))
    if added := gather_overheads(rows):
        print(f"\n{format_rows(added, OVERHEAD_COLUMNS)}")
    for row in rows:
        if row.get("measure") == "decision":
            print(f"A decision among {row['waiting']} requests: {row['p50_ms']:.3f} ms, p99 {row['p99_ms']:.3f} ms")
    if simulated := simulate(rows):
        print(f"\nEffective accuracy on a simulated clock, %\n\n{format_rows(simulated, SIMULATED_COLUMNS)}")
    plot(rows, args.plot)


if __name__ == "__main__":
    main()
