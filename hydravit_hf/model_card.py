"""The model card: how good each width of a checkpoint is, what it costs and how to load it."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import TrainerCallback
from transformers.utils import logging

from .evaluation import evaluate_subnetworks
from .model.configuration_hydravit import HydraViTConfig, as_pair
from .model.modeling_hydravit import HydraViTForImageClassification
from .previous_card import TEMPLATE, PreviousCard
from .profiling import add_costs, profile_subnetworks
from .reporting import format_table, plot_accuracy

logger = logging.get_logger(__name__)

DATASET_NAME = "held-out images"


def create_model_card(
    model: HydraViTForImageClassification | HydraViTConfig,
    results: list[dict],
    title: str,
    model_id: str | None = None,
    dataset_name: str = DATASET_NAME,
    dataset_id: str | None = None,
    dataset_split: str = "test",
    results_note: str | None = None,
    results_source: tuple[str, str] | None = None,
    training: str | None = None,
    limits: str | None = None,
    plot: str | None = None,
    license: str = "apache-2.0",
    base_model: str | None = None,
    ordered_from: str | None = None,
) -> ModelCard:
    """Make a card for the Hub, with the accuracy of every width as `model-index` metadata.

    Args:
        model: The model or its configuration.
        results: A row for each width, as `evaluate_subnetworks` gives them. A row has `num_heads` and `accuracy` (a
            fraction), and may have all columns of `profile_subnetworks`. `parameters` and `macs` are counted if they
            are missing.
        title: Name of the model.
        model_id: Hub id or folder that the code on the card loads. None means the title.
        dataset_name, dataset_id, dataset_split: Name, Hub id and split of the data that the accuracy was measured on.
        results_note: Sentence above the table, such as who measured. None names the data.
        results_source: Source of the numbers, (name, URL), if the model's maker did not measure them.
        training: Training data and recipe, in Markdown. None leaves the section out.
        limits: Limits beyond those that every HydraViT has, in Markdown.
        plot: Name of the plot, a file beside the card. None leaves it out.
        license: Licence of the weights.
        base_model: Hub id of the model that training started from.
        ordered_from: Name of the ViT whose parts `elastify` has ordered, if no width was trained after it.

    Raises:
        ValueError: There are no results, a row lacks `num_heads` or `accuracy`, or the model does not hold a width.

    Examples:
        >>> from hydravit_hf import HydraViTConfig, create_model_card
        >>> rows = [{"num_heads": 3, "accuracy": 0.7}, {"num_heads": 12, "accuracy": 0.8}]
        >>> card = create_model_card(HydraViTConfig(), rows, "my-model", dataset_name="my images")
        >>> card.data.eval_results[0].metric_value
        0.7
    """
    config = _config_of(model)
    if not results or any(not {"num_heads", "accuracy"} <= row.keys() for row in results):
        raise ValueError("`results` must have a row for each width, each with `num_heads` and `accuracy`.")
    results = add_costs(config, results)
    source_name, source_url = results_source or (None, None)
    metrics = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset_id or dataset_name,
            dataset_name=dataset_name,
            dataset_split=dataset_split,
            metric_type="accuracy",
            metric_name=f"Accuracy, {row['num_heads']} heads",
            metric_value=round(row["accuracy"], 5),
            metric_args={"num_heads_active": row["num_heads"]},
            source_name=source_name,
            source_url=source_url,
        )
        for row in results
    ]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        license=license,
        tags=["hydravit", "vision-transformer", "nested-models"],
        datasets=dataset_id,
        metrics=["accuracy"],
        base_model=base_model,
        model_name=title,
        eval_results=metrics,
    )
    heads = config.subnetwork_heads
    contiguous = len(heads) > 2 and heads == list(range(heads[0], heads[-1] + 1))
    trained_widths = f"{heads[0]} to {heads[-1]}" if contiguous else _listed(heads)
    speed = "latency_ms" if "latency_ms" in results[0] else "throughput"
    columns = ("num_heads", "parameters", "macs", speed, "peak_memory_mb", "accuracy", "top5_accuracy")
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=title,
        config=config,
        image_size=" x ".join(map(str, as_pair(config.image_size))),
        trained_widths=trained_widths,
        cascade_heads=_listed(config.cascade["num_heads"]) if config.cascade else None,
        results_note=results_note or f"Accuracy on {dataset_name}.",
        table=format_table([{key: row[key] for key in columns if key in row} for row in results]),
        machine=_machine(results[0]),
        plot=plot,
        model_id=model_id or title,
        image="image.png",
        narrow=results[0]["num_heads"],
        budget=f"{results[len(results) // 2]['macs']:.2e}".replace("e+0", "e").replace("e+", "e"),
        training=training,
        limits=limits,
        ordered_from=ordered_from,
    )


def save_model_card(folder: str | Path, model, results: list[dict], title: str, **kwargs) -> ModelCard:
    """Write the card `README.md`, its plot `accuracy_over_macs.png` and `results.json` into a folder. The arguments are
    those of `create_model_card`.

    A card of this function that is there already is made again, and what can't be computed stays: the sections and the
    metadata that this function does not write, the licence and the id that the code loads. Unless the accuracies say
    that the weights are others, the base model, the texts on training and limits and the results of other data stay
    too. An argument that is given, and is not None, replaces what the card says.
    """
    folder, plot = Path(folder), "accuracy_over_macs.png"
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    results = add_costs(_config_of(model), results)
    previous = PreviousCard.read(folder / "README.md")
    if previous is not None:
        kwargs = previous.complete(kwargs, results)
    card = create_model_card(model, results, title, plot=plot, **kwargs)
    if previous is not None:
        previous.add_to(card)
    plot_accuracy(results, folder / plot, kwargs.get("dataset_name", DATASET_NAME))
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    card.save(folder / "README.md")
    return card


class ModelCardCallback(TrainerCallback):
    """Evaluates every width when a `Trainer` ends training, and writes the model card into its `output_dir`.

    `HydraViTTrainer` adds it by itself. For the stock `Trainer`, pass it in `callbacks`. A failure is logged and raises
    nothing, so that it can't cost a finished training.

    Args:
        dataset: Held-out data for `evaluate_subnetworks`, or a function that returns them, or None for no card.
        measure: Whether to measure latency and memory on this machine.
        card: Further arguments of `create_model_card`. The title defaults to the name of the repository or folder.
    """

    def __init__(self, dataset, measure: bool = True, **card):
        self.dataset, self.measure, self.card = dataset, measure, card

    def on_train_end(self, args, state, control, model=None, **kwargs):
        try:
            self._write(args, state, model)
        except Exception as error:
            logger.warning(f"The model card was not written: {type(error).__name__}: {error}")

    def _write(self, args, state, model):
        from accelerate import Accelerator

        accelerator = Accelerator()  # shares its state with the Trainer's
        dataset = self.dataset() if callable(self.dataset) else self.dataset
        if dataset is None:
            return
        options = {"batch_size": args.per_device_eval_batch_size, "num_workers": args.dataloader_num_workers}
        rows = evaluate_subnetworks(model, dataset, accelerator=accelerator, disable_tqdm=args.disable_tqdm, **options)
        if not state.is_world_process_zero:
            return
        if self.measure and accelerator.distributed_type in ("NO", "MULTI_CPU", "MULTI_GPU"):  # whole weights
            heads = [row["num_heads"] for row in rows]
            costs = profile_subnetworks(model, heads, rounds=10, disable_tqdm=args.disable_tqdm)
            rows = [cost | row for cost, row in zip(costs, rows, strict=True)]
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model_id = args.hub_model_id or folder.resolve().name
        save_model_card(folder, model, rows, **{"title": model_id.rpartition("/")[2], "model_id": model_id} | self.card)


def _config_of(model: HydraViTForImageClassification | HydraViTConfig) -> HydraViTConfig:
    return model if isinstance(model, HydraViTConfig) else model.config


def _listed(heads: list[int]) -> str:
    *first, last = map(str, heads)
    return f"{', '.join(first)} and {last}" if first else last


def _machine(row: dict) -> str:
    """A sentence on the columns of a profile and the machine. Empty without a profile."""
    if "device" not in row:
        return ""
    return (
        f"Latency is the median of a forward pass of {row['batch_size']} image{'s'[: row['batch_size'] > 1]}, measured "
        f"on {row['device']}, {row['dtype']}; peak memory is the weights of that width, the images and the most that a "
        "pass allocates beside them."
    )
