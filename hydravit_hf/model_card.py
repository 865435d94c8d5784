"""The model card: what a checkpoint is, how good each of its widths is and what it costs, and how to load it."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration_hydravit import HydraViTConfig, as_pair
from .modeling_hydravit import HydraViTForImageClassification
from .profiling import with_costs
from .reporting import format_table, plot_accuracy

TEMPLATE = Path(__file__).with_name("model_card_template.md")


def create_model_card(
    model: HydraViTForImageClassification | HydraViTConfig,
    results: list[dict],
    title: str,
    model_id: str | None = None,
    dataset_name: str = "held-out images",
    dataset_id: str | None = None,
    dataset_split: str = "test",
    results_note: str | None = None,
    results_source: tuple[str, str] | None = None,
    training: str | None = None,
    limits: str | None = None,
    plot: str | None = None,
    license: str = "apache-2.0",
    base_model: str | None = None,
) -> ModelCard:
    """A card for the Hub, with the accuracy of every width as `model-index` metadata.

    Args:
        model: The model or its configuration.
        results: A row for each width, of `evaluate_subnetworks` or the like: `num_heads` and `accuracy` (a fraction),
            and whatever `format_table` knows, such as the columns of `profile_subnetworks`. `parameters` and `macs`
            are counted where they are missing.
        title: Name of the model.
        model_id: What the code of the card loads: a Hub id or a folder; None: the title.
        dataset_name, dataset_id, dataset_split: What the accuracy was measured on, as people call it and by its id.
        results_note: A sentence above the table, such as who measured; None: one that names the data set.
        results_source: Where the numbers are from, (name, URL), if they are not the model maker's own.
        training: Training data and recipe, Markdown; None: no such section.
        limits: Limits beyond those that every HydraViT has, Markdown.
        plot: Name of the plot of `plot_accuracy`, a file beside the card; None: no plot.
        license: Licence of the weights.
        base_model: Hub id of the model that the training started from.

    Raises:
        ValueError: No results, rows without `num_heads` or `accuracy`, or widths that the model doesn't hold.
    """
    config = _config_of(model)
    if not results or any(not {"num_heads", "accuracy"} <= row.keys() for row in results):
        raise ValueError("`results` must have a row for each width, each with `num_heads` and `accuracy`.")
    results = with_costs(config, results)
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
    )


def save_model_card(folder: str | Path, model, results: list[dict], title: str, **kwargs) -> ModelCard:
    """Write the card, `README.md`, with its plot, `accuracy_over_macs.png`, and `results.json` into a folder; the
    arguments are those of `create_model_card`."""
    folder, plot = Path(folder), "accuracy_over_macs.png"
    results = with_costs(_config_of(model), results)
    card = create_model_card(model, results, title, plot=plot, **kwargs)
    plot_accuracy(results, folder / plot, kwargs.get("dataset_name", "held-out images"))
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    card.save(folder / "README.md")
    return card


def _config_of(model: HydraViTForImageClassification | HydraViTConfig) -> HydraViTConfig:
    return model if isinstance(model, HydraViTConfig) else model.config


def _listed(heads: list[int]) -> str:
    *first, last = map(str, heads)
    return f"{', '.join(first)} and {last}" if first else last


def _machine(row: dict) -> str:
    """What the columns of a profile mean, and where they were measured; empty where there are none."""
    if "device" not in row:
        return ""
    return (
        f"Latency is the median of a forward pass of {row['batch_size']} image{'s'[: row['batch_size'] > 1]}, measured "
        f"on {row['device']}, {row['dtype']}; peak memory is the weights of that width, the images and the most that a "
        "pass allocates beside them."
    )
