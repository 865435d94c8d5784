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
NOTE = """**These accuracies and throughputs are those that the authors of HydraViT publish, not measurements of ours**
([ds-kiel/HydraViT](https://github.com/ds-kiel/HydraViT); top-1 on the validation images of ImageNet-1K, images per
second on an A100; which training run they belong to is not stated there). Parameters and MACs are counted."""
TRAINING = """The weights are the authors' (Zenodo record 14300201), converted from their training file by

```bash
hydravit convert model_best.pth.tar hydravit-base-patch16-224
```

Their recipe: ImageNet-1K, one width drawn at each step; 300 epochs and 10 of cool-down on two A100, 512 images on each;
AdamW with learning rate 5e-4 for 512 images, scaled linearly, 5 epochs of warm-up and a cosine down to 1e-5; weight
decay 0.05, drop path 0.1, RandAugment, mixup 0.8, CutMix 1.0, label smoothing 0.1, random erasing 0.25, averaged
weights with decay 0.99996; images resized so that 0.9 of the shorter side is the 224-pixel crop."""
LIMITS = """The licence of the weights is their authors' to tell. The conversion was checked against logits that the
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
