# ruff: noqa: RUF009  (`option` is `dataclasses.field`)
"""The arguments that all training scripts share, and what the scripts make of them.

    data_args, model_args = parse_arguments(__doc__, (DataArguments, ModelArguments))
    data = data_args.load()
    train = data["train"]
    model, processor = make_model(data_args, model_args, train.features["label"].names, train)
    train_images, test_images = make_datasets(data, processor)

A script adds the arguments of its own loop. It needs the extra `train`.
"""

import argparse
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import yaml
from transformers import HfArgumentParser, PreTrainedConfig, TrainingArguments

from ..evaluation import evaluate_classifier
from ..folders import short_name
from ..image_processing import load_image_processor, make_image_processor
from ..model.configuration_hydravit import HydraViTConfig
from ..model.modeling_hydravit import HydraViTForImageClassification
from ..model.sources_hydravit import read_source
from ..reporting import format_table
from .augmentation import StreamedTrainingImages, TrainingAugmentation, TrainingImages
from .runs import last_whole_checkpoint, list_checkpoints

DIGITS = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 3}  # a small model for small images
SHUFFLE_BUFFER = 10_000  # images of a stream that wait to be drawn
PRINTED = ("num_heads", "parameters", "macs", "latency_ms", "accuracy", "top5_accuracy", "loss")


def option(default, help: str, **metadata):
    """Make a field of a dataclass with a help text."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class DataArguments:
    """Where the images come from."""

    _argument_group_name = "data (default: the handwritten digits of scikit-learn)"

    dataset_name: str | None = option(None, "Dataset id of the Hub.")
    data_dir: str | None = option(None, "Local folder of images, or of parquet files.")
    config_name: str | None = option(None, "Configuration of a data set on the Hub.")
    image_column: str | None = option(None, "Column of the images. Default: found by type and name.")
    label_column: str | None = option(None, "Column of the labels. Default: found by type and name.")
    train_split: str | None = option(None, "Split to train on. Default: found by name.")
    test_split: str | None = option(None, "Split to test on. Default: found by name, or a fifth is held out.")
    streaming: bool = option(False, "Read the images while training; make no local copy.")
    skip_broken_images: bool = option(False, "Read all images first, and leave out those that can't be read.")

    def __post_init__(self):
        self.left_out = 0
        if self.streaming and self.skip_broken_images:
            raise ValueError("--skip_broken_images reads all images first: not with --streaming")
        if self.streaming and self.is_digits:
            raise ValueError("--streaming needs --dataset_name or --data_dir")

    @property
    def is_digits(self) -> bool:
        return self.dataset_name is None and self.data_dir is None

    def load(self):
        """Load the images as train and test splits, and check the labels; see `hydravit_hf.data.load_images`."""
        from datasets import ClassLabel

        from ..data import check_labels, load_images

        columns = {"image_column": self.image_column, "label_column": self.label_column}
        splits = {"train_split": self.train_split, "test_split": self.test_split}
        options = {"streaming": self.streaming} | ({} if self.config_name is None else {"name": self.config_name})
        data = load_images(self.dataset_name, self.data_dir, **columns, **splits, **options)
        if not isinstance(data["train"].features["label"], ClassLabel):
            raise ValueError(
                "The images have several labels or numbers as labels; this script trains single-label classifiers. "
                "`HydraViTTrainer` trains them in code: see docs/data.md."
            )
        if not self.streaming:
            check_labels(data["train"], data["train"].features["label"].num_classes)
        return data

    def leave_out_broken(self, data):
        """With `skip_broken_images`, leave out the images that can't be read. Call it in all processes alike."""
        if not self.skip_broken_images:
            return data
        from ..data_checks import leave_out_broken

        data, numbers = leave_out_broken(data)
        self.left_out = sum(numbers.values())
        return data


@dataclass
class ModelArguments:
    """The model to start from, and its image processor."""

    _argument_group_name = "model (default: a new one)"

    model_name_or_path: str | None = option(None, "HydraViT to start from.")
    from_vit: str | None = option(None, "ViT to start from: its folder or Hub id.")
    elastify: bool = option(False, "Order the ViT's directions, heads and neurons first. The ViT teaches, if it can.")
    ignore_mismatched_sizes: bool = option(False, "Give a HydraViT of other labels a new classifier.")
    num_attention_heads: int | None = option(None, "Heads to hold. Default: 12, or those of the ViT with --elastify.")
    head_dim: int | None = option(None, "Channels of each head of a new model. Default: 64.")
    num_hidden_layers: int | None = option(None, "Layers of a new model. Default: 12, or 3 for the digits.")
    image_size: int | None = option(None, "Pixels of a side. Default: as the start, or 224, or 8 for the digits.")
    patch_size: int | None = option(None, "Pixels of a patch of a new model. Default: 16, or 4 for the digits.")
    crop_fraction: float = option(1.0, "Part of the image that the centre crop of evaluation keeps; 1 crops nothing.")
    drop_path_rate: float = option(0.0, "Rate of stochastic depth in the last layer.")
    subnetwork_heads: list[int] | None = option(None, "Head counts to train. Default: 3 up to all.")
    subnetwork_weights: list[float] | None = option(None, "Their odds. Default: equal, or 3 1 1 ... for the digits.")
    separate_classifiers: bool = option(False, "Give each width a classifier of its own.")
    token_recycling: bool = option(False, "Make --subnetwork_heads stages. Each starts from the tokens before it.")

    def __post_init__(self):
        if self.model_name_or_path and self.from_vit:
            raise ValueError("give --model_name_or_path or --from_vit, not both")
        if self.head_dim is not None and (self.model_name_or_path or self.from_vit):
            raise ValueError("--head_dim is for a new model: not with --model_name_or_path or --from_vit")
        if self.elastify and not self.from_vit:
            raise ValueError("--elastify orders the parts of a ViT: give --from_vit too")


@dataclass
class AugmentationArguments:
    """Random views of the training images; see `TrainingAugmentation`."""

    _argument_group_name = "augmentation, beside mixup and CutMix (default: none)"

    augment: bool = option(False, "Train on random views of the images, as below.")
    crop_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0], metadata={"help": "Smallest and largest share of the area in a crop."}
    )
    flip: float = option(0.5, "Odds of a mirror image.")
    rand_augment_magnitude: float = option(9, "Strength of RandAugment, from 0 to 10.")
    random_erasing: float = option(0.25, "Odds that a rectangle becomes noise.")

    def __post_init__(self):
        if len(self.crop_scale) != 2:
            raise ValueError(f"--crop_scale takes two numbers, not {len(self.crop_scale)}")


@dataclass
class LoopArguments:
    """How a loop without a `Trainer` trains. A resumed run must have the same."""

    _argument_group_name = "recipe"

    num_train_epochs: int = option(25, "Passes over the training images.")
    max_train_steps: int | None = option(None, "Optimizer steps, instead of epochs.")
    steps_per_epoch: int | None = option(None, "Optimizer steps of an epoch, for a stream: its length is unknown.")
    per_device_train_batch_size: int = option(64, "Images of a batch in each process.")
    per_device_eval_batch_size: int = option(128, "Images of a batch of evaluation in each process.")
    gradient_accumulation_steps: int = option(1, "Batches of an optimizer step.")
    learning_rate: float = option(5e-4, "Learning rate after the warm-up.")
    min_learning_rate: float = option(0.0, "Learning rate at the end of the cosine.")
    weight_decay: float = option(0.05, "Weight decay of matrices and kernels.")
    warmup_ratio: float = option(0.1, "Share of the steps that warm up.")
    label_smoothing: float = option(0.1, "Smoothing of the labels.")
    max_grad_norm: float = option(1.0, "Norm to which gradients are clipped; 0 clips nothing.")
    mixed_precision: str = option("no", "Precision of the passes.", choices=["no", "fp16", "bf16"])
    seed: int = option(0, "Seed of the run.")


@dataclass
class RunArguments:
    """Where a loop without a `Trainer` runs. A resumed run may have others."""

    _argument_group_name = "run"

    output_dir: Path = option(Path("runs/digits"), "Folder of the run.")
    overwrite_output_dir: bool = option(False, "Start anew in a folder that is not empty.")
    num_workers: int = option(0, "Processes that load images.")
    evaluation_epochs: int | None = option(None, "Epochs between evaluations. Default: evaluate at the end only.")
    checkpointing_steps: str | None = option(None, "Steps between checkpoints, or 'epoch'.")
    checkpoints_total_limit: int | None = option(None, "Checkpoints to keep.")
    resume_from_checkpoint: str | None = option(None, "Checkpoint folder of this run, or 'latest'.")
    with_tracking: bool = option(False, "Log to trackers.")
    report_to: str = option("all", "Trackers: tensorboard, wandb, ...; all: those that are installed.")
    push_to_hub: bool = option(False, "Publish the checkpoint and its card.")
    hub_model_id: str | None = option(None, "Repository to publish to. Default: the name of the folder.")

    def __post_init__(self):
        if self.checkpointing_steps not in (None, "epoch") and not str(self.checkpointing_steps).isdigit():
            raise ValueError("--checkpointing_steps must be a number or 'epoch'")

    @property
    def is_resumed(self) -> bool:
        return self.resume_from_checkpoint is not None

    def find_checkpoint(self) -> Path | None:
        """The checkpoint to resume from. A run that stopped before its first one has none, and starts anew."""
        if self.resume_from_checkpoint != "latest":
            return None if self.resume_from_checkpoint is None else Path(self.resume_from_checkpoint)
        return next(reversed(list_checkpoints(self.output_dir)), None)


@dataclass
class SaveArguments:
    """Which files hold the trained model. A resumed run may have others."""

    _argument_group_name = "saving (default: one file)"

    shard_by_heads: bool = option(False, "Save a file for each width: a load of few heads needs the first ones only.")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each option under one name, and only the defaults that say something."""

    def _format_action_invocation(self, action):
        return super()._format_action_invocation(action).split(", --")[0]

    def _get_help_string(self, action):
        is_silent = action.default is None or action.default is False
        return action.help if is_silent else super()._get_help_string(action)


def parse_arguments(doc: str, classes: tuple[type, ...], **defaults) -> list:
    """Parse the command line into an object of each dataclass.

    The option `--config` names a YAML file of arguments. Those of the command line come before it.

    Args:
        doc: Docstring of the script. Its first line describes the command.
        classes: The dataclasses. A `ValueError` of theirs ends the command with its message.
        defaults: Defaults that differ from those of the dataclasses.
    """
    parser = HfArgumentParser(
        classes, description=doc.partition("\n")[0], usage="%(prog)s [options]", formatter_class=_HelpFormatter
    )
    parser.add_argument("--config", help="YAML file of arguments. Those of the command line come before it.")
    parser.set_defaults(**defaults)
    given = parser.parse_known_args()[0]
    if given.config is not None:
        values = yaml.safe_load(Path(given.config).read_text(encoding="utf-8"))
        if given.data_dir is not None:
            values.pop("dataset_name", None)
        if unknown := sorted(values.keys() - vars(parser.parse_args([])).keys()):
            parser.error(f"{given.config} has unknown arguments: {', '.join(unknown)}")
        parser.set_defaults(**values)
    parser.parse_args()  # refuses what no one knows
    try:
        return list(parser.parse_args_into_dataclasses(look_for_args_file=False)[:-1])
    except ValueError as error:
        parser.error(str(error))


def make_model(data_args: DataArguments, model_args: ModelArguments, labels: list[str], images=None):
    """Make the model to train, and its image processor.

    Args:
        data_args: The digits get a small model, if it is a new one.
        model_args: The start and the overrides of its configuration.
        labels: Names of the classes.
        images: The training images, as `DataArguments.load` gives them, for `--elastify`.
    """
    sizes = {name: value for name in (*DIGITS, "head_dim") if (value := getattr(model_args, name)) is not None}
    options = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    options["problem_type"] = None  # the start may have another one; the images have one label each
    for name in ("drop_path_rate", "subnetwork_heads", "subnetwork_weights", "separate_classifiers", "token_recycling"):
        if value := getattr(model_args, name):
            options[name] = value
    if model_args.token_recycling:
        options.setdefault("subnetwork_weights", None)  # a start may have some, but stages are not drawn
    start = model_args.model_name_or_path or model_args.from_vit
    if start is None:
        sizes = (DIGITS if data_args.is_digits else {}) | sizes
        config = HydraViTConfig(num_attention_heads=model_args.num_attention_heads or 12, **sizes, **options)
        if data_args.is_digits and model_args.subnetwork_weights is None and not model_args.token_recycling:
            # the narrowest width is a part of all others, so it is drawn more often
            config.subnetwork_weights = [3.0] + [1.0] * (len(config.subnetwork_heads) - 1)
        model = HydraViTForImageClassification(config)
        half = (0.5,) * 3 if data_args.is_digits else None
        return model, make_image_processor(config, half, half, model_args.crop_fraction)
    if "image_size" in sizes:
        options["image_size"] = sizes["image_size"]
    if model_args.from_vit:
        options["num_labels"] = len(labels)
        return _start_from_vit(start, images, options, model_args)
    options["ignore_mismatched_sizes"] = model_args.ignore_mismatched_sizes
    model = HydraViTForImageClassification.from_pretrained(start, **options)
    return model, load_image_processor(start, model.config, model_args.crop_fraction)


def _start_from_vit(start: str, images, options: dict, model_args: ModelArguments):
    source = read_source(start)
    image_size = options.get("image_size", source.arguments["image_size"])
    config = HydraViTConfig(**{**source.arguments, "image_size": image_size})
    processor = load_image_processor(start, config, model_args.crop_fraction)
    if not model_args.elastify:
        num_heads = model_args.num_attention_heads or 12
        return HydraViTForImageClassification.from_vit(source, num_heads, **options), processor
    from ..data import to_pixel_values, undecoded
    from ..elastification import elastify

    images = undecoded(images).with_transform(to_pixel_values(processor))
    return elastify(source, images, model_args.num_attention_heads, **options), processor


def find_teacher(teacher: str | None, model_args: ModelArguments, labels: list[str]) -> str | None:
    """The teacher that is named, or else the ViT of `--elastify`, if it has the classes of the data."""
    if teacher is not None or not model_args.elastify:
        return teacher
    config, _ = PreTrainedConfig.get_config_dict(model_args.from_vit)
    names = config.get("label_names") or list(config.get("id2label", {}).values())
    return model_args.from_vit if sorted(names) == sorted(labels) else None


def make_datasets(
    data,
    processor,
    augmentation: AugmentationArguments | None = None,
    seed: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
) -> tuple:
    """Make the datasets to train and to test on: items `{"pixel_values": (C, H, W), "labels": int}`.

    Args:
        data: The splits "train" and "test", as `DataArguments.load` gives them.
        processor: The model's image processor.
        augmentation: How to make random views. None, or one without `augment`, trains on the images as they are.
        seed: Seed of the views, and of a stream's order.
        process_index, num_processes: For streams that the script shares out itself: the part of this process.
    """
    from datasets import IterableDataset
    from datasets.distributed import split_dataset_by_node

    from ..data import to_pixel_values, undecoded

    transform = to_pixel_values(processor)
    view = partial(_plain_view, transform=transform)
    if augmentation is not None and augmentation.augment:
        view = TrainingAugmentation(
            processor,
            crop_scale=tuple(augmentation.crop_scale),
            flip=augmentation.flip,
            rand_augment_magnitude=augmentation.rand_augment_magnitude,
            random_erasing=augmentation.random_erasing,
        )
    train, test = undecoded(data["train"]), undecoded(data["test"])
    if not isinstance(train, IterableDataset):
        return TrainingImages(train, view, seed), test.with_transform(transform)
    train = split_dataset_by_node(train.shuffle(seed, buffer_size=SHUFFLE_BUFFER), process_index, num_processes)
    test = test.map(transform, batched=True, remove_columns=test.column_names)
    return StreamedTrainingImages(train, view, seed), test


def _plain_view(image, seed, transform):
    """The image as it is evaluated, for training without augmentation."""
    return transform({"image": [image], "label": [0]})["pixel_values"][0]


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint that a `Trainer` resumes from. "latest" is the last one that was saved whole in `output_dir`."""
    if args.resume_from_checkpoint != "latest":
        return args.resume_from_checkpoint
    return str(last_whole_checkpoint(Path(args.output_dir), args.world_size))


def describe_card(data_args: DataArguments, model_args: ModelArguments, test_images) -> dict:
    """The arguments of `create_model_card` that name the held-out images and the model that training started from."""
    count = None if data_args.streaming else len(test_images)
    source = short_name(data_args.dataset_name or data_args.data_dir or "the handwritten digits of scikit-learn")
    if data_args.left_out:
        source += f" ({data_args.left_out} broken images left out)"
    start = model_args.model_name_or_path or model_args.from_vit
    return {
        "dataset_name": f"{'' if count is None else f'{count} '}held-out images of {source}",
        "dataset_id": data_args.dataset_name,
        "base_model": None if start is None or Path(start).exists() else start,
        "limits": None if count is None else f"One held-out image is {100 / count:.2f} points of accuracy.",
    }


def describe_teacher(name: str, teacher, test_images, dataset_name: str) -> dict:
    """The argument of `create_model_card` that says how good the teacher is on the held-out images."""
    accuracy = evaluate_classifier(teacher, test_images)["accuracy"]
    return {"results_note": f"Accuracy on {dataset_name}. The teacher, {short_name(name)}, has {accuracy:.2%}."}


def print_results(folder: Path, dataset_name: str):
    """Print the table of all widths that a training has left in its folder, and what it was measured on."""
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    print(f"\n{format_table([{key: row[key] for key in PRINTED if key in row} for row in rows])}")
    print(f"\nMean accuracy over the widths: {mean:.2%}, on {dataset_name}")
    if "device" in rows[0]:
        print(f"Latency of one image on {rows[0]['device']}")
    print(f"The checkpoint, its card README.md, results.json and accuracy_over_macs.png are in {folder}")
