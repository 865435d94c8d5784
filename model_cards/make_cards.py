"""Make the cards of the released checkpoints.

python model_cards/make_cards.py                        # hydravit-base-patch16-224, from the published figures
python examples/train_accelerate.py --output_dir runs/hydravit-digits
python model_cards/make_cards.py runs/hydravit-digits   # hydravit-digits, as that training run left it
"""

import shutil
import sys
from pathlib import Path

from hydravit_hf import HydraViTConfig
from hydravit_hf.model_card import save_model_card

CARDS = Path(__file__).parent
FILES = ("README.md", "results.json", "accuracy_over_macs.png")

# heads -> ImageNet-1K top-1 in %, images per second on an A100: the figures of https://github.com/ds-kiel/HydraViT
PUBLISHED = {
    3: (70.560, 10048),
    4: (75.396, 7558),
    5: (77.796, 5652),
    6: (79.276, 4604),
    7: (80.346, 3616),
    8: (80.800, 3142),
    9: (80.984, 2503),
    10: (81.026, 2243),
    11: (81.080, 1916),
    12: (81.096, 1754),
}
NOTE = """**The authors of HydraViT publish these accuracies and throughputs; they are not measurements of ours**
([ds-kiel/HydraViT](https://github.com/ds-kiel/HydraViT)). The accuracy is top-1 on the validation images of
ImageNet-1K. The throughput is in images per second on an A100. The authors do not state to which training run the
figures belong. Parameters and MACs are counted."""
TRAINING = """The weights are the authors' (Zenodo record 14300201). This command converts their training file:

```bash
hydravit convert model_best.pth.tar hydravit-base-patch16-224
```

Their recipe trains on ImageNet-1K and draws one width at each step. It takes 300 epochs and 10 of cool-down on two
A100, with 512 images on each. The optimizer is AdamW with weight decay 0.05. The learning rate is 5e-4 for 512 images,
scaled linearly, with 5 epochs of warm-up and a cosine down to 1e-5. The recipe also has drop path 0.1, RandAugment,
mixup 0.8, CutMix 1.0, label smoothing 0.1, random erasing 0.25, and averaged weights with decay 0.99996. Images are
resized so that the 224-pixel crop is 0.9 of the shorter side."""
LIMITS = """Only the authors can state the licence of the weights. The conversion was checked against logits that the
original gives for recorded weights, not on the published file."""


def make_base_card(folder: Path):
    rows = [
        {"num_heads": num_heads, "throughput": float(throughput), "accuracy": accuracy / 100}
        for num_heads, (accuracy, throughput) in PUBLISHED.items()
    ]
    folder.mkdir(exist_ok=True)
    save_model_card(
        folder,
        HydraViTConfig(num_labels=1000),
        rows,
        title="hydravit-base-patch16-224",
        dataset_name="ImageNet-1K",
        dataset_id="ILSVRC/imagenet-1k",
        dataset_split="validation",
        results_note=NOTE,
        results_source=("HydraViT", "https://github.com/ds-kiel/HydraViT"),
        training=TRAINING,
        limits=LIMITS,
        license="unknown",
    )


if __name__ == "__main__":
    if len(sys.argv) == 1:
        make_base_card(CARDS / "hydravit-base-patch16-224")
    for run in map(Path, sys.argv[1:]):
        (CARDS / run.name).mkdir(exist_ok=True)
        for file in FILES:
            shutil.copy(run / file, CARDS / run.name)
