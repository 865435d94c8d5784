"""What a width costs to download from a Hub: bytes and seconds, of files by width and of one file.

    python examples/benchmarks/benchmark_download.py --rate 20

A Hub on loopback serves one checkpoint in both formats, over a link of `--rate` MB/s, and counts the bytes of its
answers. Each row is a process with a cache of its own that calls `from_pretrained(..., num_attention_heads=k)`; a row
"6 after 3" has those of 3 heads in its cache. The ordinary checkpoint of 3 heads is a stock ViT. Xet is switched off,
because this Hub has no Xet storage.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import format_rows, write_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support.hub_server import HubServer, Repo

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, reshard_checkpoint

LOAD = """
import json, sys, time
name, class_name, keywords = json.loads(sys.argv[1])
if class_name.startswith("HydraViT"):
    import hydravit_hf as package
else:
    import transformers as package
model_class = getattr(package, class_name)
start = time.perf_counter()
model_class.from_pretrained(name, **keywords)
print(time.perf_counter() - start)
"""
CHECKPOINTS = ["vit-3", "by-width", "one-file"]
COLUMNS = {
    "checkpoint": ("checkpoint", ""),
    "heads": ("heads", ""),
    "mb": ("downloaded, MB", ".2f"),
    "weights_mb": ("of it weights, MB", ".2f"),
    "expected_mb": ("an ordinary file, MB", ".2f"),
    "ratio": ("ratio", ".3f"),
    "seconds": ("load, s", ".1f"),
    "link_seconds": ("on the link alone, s", ".1f"),
}


def load(hub: HubServer, cache: Path, name: str, model_class: type, keywords: dict) -> dict:
    """Load once, in a process of its own."""
    start, environment = len(hub.log), dict(os.environ)
    environment.pop("HF_HUB_OFFLINE", None)
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", LOAD, json.dumps([name, model_class.__name__, keywords])]
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    seconds = float(subprocess.run(command, check=True, **options).stdout)
    total, weights = hub.bytes_sent(start=start), hub.bytes_sent("/storage/", start)
    return {"mb": total / 1e6, "weights_mb": weights / 1e6, "seconds": seconds}


def measure(folder: Path, config: HydraViTConfig, rate: float, checkpoints: list[str]) -> list[dict]:
    """Make the checkpoints, serve them, and download some of them in the ways of the rows."""
    from transformers import ViTForImageClassification

    model = HydraViTForImageClassification(config)
    model.save_pretrained(folder / "one-file")
    reshard_checkpoint(folder / "one-file", folder / "by-width")
    model.to_vit(3).save_pretrained(folder / "vit-3")
    ordinary = {}  # what a checkpoint of each width would have in one file
    for num_heads in (3, 6, config.num_attention_heads):
        model.extract_subnetwork(num_heads).save_pretrained(folder / "ordinary")
        ordinary[num_heads] = (folder / "ordinary" / "model.safetensors").stat().st_size / 1e6
    del model
    rows = []
    with HubServer(rate=rate * 1e6) as hub:
        for name in CHECKPOINTS:
            hub.repos[f"user/{name}"] = repo = Repo(private=False)
            repo.commit("main", {file.name: file.read_bytes() for file in (folder / name).iterdir()})
            hub.store(repo)

        def add(name: str, heads: str, expected: float, cache: str, model_class=HydraViTForImageClassification, **kw):
            if name not in checkpoints:
                return
            row = load(hub, folder / cache, f"user/{name}", model_class, kw)
            row |= {"checkpoint": name, "heads": heads, "expected_mb": expected, "ratio": row["mb"] / expected}
            rows.append(row | {"link_seconds": expected / rate, "rate": rate})

        every = config.num_attention_heads
        add("vit-3", "3", ordinary[3], "a", ViTForImageClassification)
        add("by-width", "3", ordinary[3], "b", num_attention_heads=3)
        add("by-width", "6 after 3", ordinary[6] - ordinary[3], "b", num_attention_heads=6)
        add("by-width", f"{every} after 6", ordinary[every] - ordinary[6], "b")
        add("by-width", "6", ordinary[6], "c", num_attention_heads=6)
        add("by-width", str(every), ordinary[every], "d")
        add("one-file", "3", ordinary[3], "e", num_attention_heads=3)
        add("one-file", str(every), ordinary[every], "f")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=20, help="MB/s of the link")
    parser.add_argument("--config", type=json.loads, default={}, help="arguments of HydraViTConfig, JSON")
    parser.add_argument("--checkpoints", nargs="+", default=CHECKPOINTS, choices=CHECKPOINTS)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure(
            Path(temporary), HydraViTConfig(**{"num_labels": 1000} | args.config), args.rate, args.checkpoints
        )
    print(format_rows(rows, COLUMNS))
    if args.json is not None:
        write_rows(args.json, rows)
