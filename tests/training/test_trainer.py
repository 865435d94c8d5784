"""Real runs of both Trainers: the widths of a step, what is evaluated and saved, and runs that are resumed."""

import copy
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score
from support.cards import CARD, card_in, check_card
from support.models import spread
from support.training import (
    QUIET,
    SANDWICH,
    Crash,
    Record,
    Wreck,
    assert_close,
    assert_equal,
    losses_of,
    make_config,
    make_model,
    metrics_of,
    own,
    shells,
    weights_of,
)
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from hydravit_hf import (
    HydraViTConfig,
    HydraViTForImageClassification,
    HydraViTTrainer,
    HydraViTTrainingArguments,
    evaluate_subnetworks,
    make_image_processor,
)
from hydravit_hf.data import load_digits, to_pixel_values
from hydravit_hf.training.augmentation import TrainingAugmentation, TrainingImages
from hydravit_hf.training.steps import backward_widths, sample_subnetworks

# Steps of one batch, which move each weight by its gradient
ONE_STEP = {"max_steps": 1, "per_device_train_batch_size": 84, "optim": "sgd", "learning_rate": 1.0}
ONE_STEP |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def logits_of(model, items, num_heads: int | None) -> torch.Tensor:
    return model(torch.stack([item["pixel_values"] for item in items]), num_heads_active=num_heads).logits


def labels_of(items) -> torch.Tensor:
    return torch.tensor([int(item["labels"]) for item in items])


# The stock Trainer


def train_with_stock_trainer(
    folder, config: HydraViTConfig, **kwargs
) -> tuple[HydraViTForImageClassification, list[dict]]:
    """Train on the digits; gives the model and the accuracy of each width on those held out."""
    torch.manual_seed(0)
    model = HydraViTForImageClassification(config)
    data = load_digits().with_transform(to_pixel_values(make_image_processor(config)))
    arguments = TrainingArguments(
        output_dir=str(folder),
        remove_unused_columns=False,  # the transform makes the columns that the model wants
        **QUIET,
        **kwargs,
    )
    trainer = Trainer(model, arguments, train_dataset=data["train"], processing_class=make_image_processor(config))
    trainer.train()
    trainer.save_model()
    rows = evaluate_subnetworks(model, data["test"])
    for row in rows:
        loaded = HydraViTForImageClassification.from_pretrained(folder, num_attention_heads=row["num_heads"])
        (again,) = evaluate_subnetworks(loaded, data["test"], heads=[row["num_heads"]])
        assert again["accuracy"] == row["accuracy"]
    return model, rows


def test_the_stock_trainer_trains_every_width_and_saves_a_checkpoint_that_loads_at_any(tmp_path):
    _, rows = train_with_stock_trainer(
        tmp_path, make_config(head_dim=16), max_steps=120, learning_rate=3e-3, per_device_train_batch_size=32
    )
    assert [row["num_heads"] for row in rows] == [3, 4]
    assert all(row["accuracy"] > 0.6 for row in rows)  # chance is 0.1


@pytest.mark.slow
def test_the_stock_trainer_makes_every_width_of_the_default_range_good(tmp_path):
    config = make_config(num_attention_heads=12, head_dim=16, num_hidden_layers=2)
    _, rows = train_with_stock_trainer(
        tmp_path, config, max_steps=250, learning_rate=2e-3, per_device_train_batch_size=64
    )
    assert [row["num_heads"] for row in rows] == [*range(3, 13)]
    accuracies = [row["accuracy"] for row in rows]
    assert min(accuracies) > 0.9, accuracies  # the least was 94.7 %


# Evaluation


def test_every_width_is_evaluated_with_default_arguments_as_by_evaluate_subnetworks(make_trainer, digits):
    trainer = make_trainer(eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=16)
    assert trainer.train().global_step == 8
    metrics = trainer.evaluate()
    assert own(metrics).keys() == {
        f"eval_{kind}_{name}" for kind in ("3_heads", "4_heads", "mean") for name in ("accuracy", "loss")
    }
    assert own(metrics) == pytest.approx(metrics_of(trainer.model, digits["test"]), rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_mean_loss"], rel=1e-2)  # the last batch is smaller
    assert metrics["eval_3_heads_loss"] != metrics["eval_4_heads_loss"]
    logged = [entry for entry in trainer.state.log_history if "eval_mean_accuracy" in entry]
    assert [entry["step"] for entry in logged] == [4, 8, 8]
    assert own(logged[1]) == own(metrics) != own(logged[0])


def test_the_widths_to_evaluate_can_be_chosen(make_trainer, digits):
    trainer = make_trainer(eval_heads=[4, 1])
    metrics = own(trainer.evaluate())
    assert metrics == pytest.approx(metrics_of(trainer.model, digits["test"], [4, 1]), rel=1e-5)
    assert len(metrics) == 6


def test_several_datasets_are_each_evaluated_at_every_width(make_trainer, digits):
    parts = {"few": digits["test"][:20], "more": digits["test"][20:]}
    trainer = make_trainer(trainer={"eval_dataset": parts}, eval_strategy="steps", eval_steps=8)
    trainer.train()
    metrics = trainer.evaluate()
    for name, items in parts.items():
        expected = metrics_of(trainer.model, items, prefix=f"eval_{name}")
        assert own(metrics, f"eval_{name}") == pytest.approx(expected, rel=1e-5)
        assert own(trainer.evaluate(items, metric_key_prefix="eval")) == pytest.approx(
            metrics_of(trainer.model, items), rel=1e-5
        )


@pytest.mark.parametrize("preprocess", [False, True])
def test_the_users_metrics_are_computed_for_each_width(make_trainer, digits, preprocess):
    shapes = []

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape)
        best = prediction.predictions if preprocess else prediction.predictions.argmax(-1)
        return {"hits": (best == prediction.label_ids).sum(), "rows": len(best)}

    functions = {"compute_metrics": compute_metrics}
    if preprocess:
        functions["preprocess_logits_for_metrics"] = lambda logits, labels: logits.argmax(-1)
    trainer = make_trainer(trainer=functions, per_device_eval_batch_size=16)
    metrics, expected = trainer.evaluate(), metrics_of(trainer.model, digits["test"])
    assert shapes == [(60,) if preprocess else (60, 10)] * 2
    for kind in ("3_heads", "4_heads", "mean"):
        assert metrics[f"eval_{kind}_hits"] == pytest.approx(60 * expected[f"eval_{kind}_accuracy"])
        assert metrics[f"eval_{kind}_rows"] == 60
    prediction = trainer.predict(digits["test"])
    assert prediction.predictions.shape == ((60,) if preprocess else (60, 10))
    assert prediction.metrics["test_hits"] == metrics["eval_4_heads_hits"]
    assert len(shapes) == 3


@pytest.mark.parametrize("num_heads", [3, None])
def test_predict_gives_the_logits_of_the_default_width(make_trainer, digits, num_heads):
    model = make_model(num_heads_active=num_heads)
    trainer = make_trainer(model, per_device_eval_batch_size=16)
    prediction = trainer.predict(digits["test"])
    with torch.no_grad():
        pixel_values = torch.stack([item["pixel_values"] for item in digits["test"]])
        logits = model.eval()(pixel_values, num_heads_active=num_heads or 4).logits
    np.testing.assert_allclose(prediction.predictions, logits.numpy(), rtol=1e-4, atol=1e-6)
    assert prediction.label_ids.tolist() == [item["labels"] for item in digits["test"]]
    (row,) = evaluate_subnetworks(model, digits["test"], [num_heads or 4])
    for name in ("accuracy", "loss"):
        assert prediction.metrics[f"test_{name}"] == pytest.approx(row[name], rel=1e-5)
    unlabelled = [{"pixel_values": item["pixel_values"]} for item in digits["test"]]
    prediction = trainer.predict(unlabelled)
    np.testing.assert_allclose(prediction.predictions, logits.numpy(), rtol=1e-4, atol=1e-6)
    assert prediction.label_ids is None and "test_accuracy" not in prediction.metrics
    with pytest.raises(ValueError, match="dataset has no `labels`"):
        trainer.evaluate(unlabelled)
    assert trainer.predict(digits["test"][:3]).predictions.shape == (3, 10)  # the error has changed nothing


def test_smoothed_labels_are_for_training_only(make_trainer, digits):
    trainer = make_trainer(label_smoothing_factor=0.3, **ONE_STEP | {"learning_rate": 0.0})
    (num_heads,) = sample_subnetworks(trainer.model.config, trainer.args.seed, 0)
    logits = logits_of(trainer.model, digits["train"], num_heads)
    trainer.train()
    expected = nn.functional.cross_entropy(logits, labels_of(digits["train"]), label_smoothing=0.3)
    assert losses_of(trainer) == pytest.approx([expected.item()], rel=1e-4)
    assert own(trainer.evaluate()) == pytest.approx(metrics_of(trainer.model, digits["test"]), rel=1e-5)


# The widths of a step


@pytest.mark.parametrize(
    "options",
    [
        {"separate_classifiers": True},
        {"token_recycling": True, "subnetwork_heads": [1, 2, 4]},
        {**SANDWICH, "sandwich_draws": 1, "distillation_weight": 0.4},
        {**SANDWICH, "separate_classifiers": True, "distillation_weight": 1.0},
        {"subnetwork_sampling": "open_sandwich", "distillation_weight": 0.4},
    ],
    ids=["one width", "token recycling", "sandwich", "sandwich, separate classifiers", "open sandwich"],
)
@pytest.mark.parametrize("taught", [False, True])
def test_a_step_has_the_gradients_and_the_loss_of_backward_widths(make_trainer, digits, options, taught):
    in_config = {"separate_classifiers", "token_recycling", "subnetwork_heads"}
    sizes = {name: value for name, value in options.items() if name in in_config}
    options = {name: value for name, value in options.items() if name not in in_config}
    model = make_model(**{"subnetwork_heads": [1, 2, 3, 4]} | sizes)
    before = weights_of(model)
    teacher = make_model(head_dim=4).to_vit() if taught else None
    trainer = make_trainer(
        model, trainer={"teacher": teacher}, label_smoothing_factor=0.1, teacher_weight=0.6, **ONE_STEP, **options
    )
    heads = trainer.args.sample(model.config, trainer.args.seed, 0, 1)
    assert len(heads) == (1 if not options else 2 if options["subnetwork_sampling"] == "open_sandwich" else 3)
    batch = torch.stack([item["pixel_values"] for item in digits["train"]]), labels_of(digits["train"])
    weight = options.get("distillation_weight", 0.0)
    loss = backward_widths(model.train(), *batch, heads, 0, weight, 0.1, teacher=trainer.teacher)
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    trainer.train()
    moved = {name: before[name] - weight for name, weight in weights_of(model).items()}
    assert_close(moved, gradients, rtol=1e-4, atol=1e-6)
    assert losses_of(trainer) == pytest.approx([loss.item()], rel=1e-4)


def test_a_copy_teaches_the_hidden_states_of_narrow_widths(make_trainer):
    def distance(weight: float) -> float:
        model = spread(make_model())
        teacher = copy.deepcopy(model).eval()
        options = {"teacher_weight": 1.0, "hidden_state_weight": weight, "max_steps": 20}
        make_trainer(model, trainer={"teacher": teacher}, **options).train()
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        states = model.eval()(images, num_heads_active=3, output_hidden_states=True).hidden_states[-1]
        full = teacher(images, num_heads_active=4, output_hidden_states=True).hidden_states[-1]
        return (states - full[..., :24]).square().mean().item()

    assert distance(3.0) < 0.9 * distance(0.0)


def test_a_resumed_run_follows_the_same_curriculum(make_trainer):
    options = {"curriculum_steps": 6, "final_subnetwork_weights": [1, 4], "save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(folder="whole", **options)
    whole.train()
    part = make_trainer(folder="part", **options)
    shutil.copytree(Path(whole.args.output_dir) / "checkpoint-4", Path(part.args.output_dir) / "checkpoint-4")
    part.train(resume_from_checkpoint=True)
    assert_equal(weights_of(part.model), weights_of(whole.model))


@pytest.mark.parametrize("options", [{}, SANDWICH])
def test_accumulated_gradients_are_those_of_a_larger_batch(make_trainer, options):
    options = {"max_steps": 6, "optim": "sgd", "learning_rate": 0.3, **options}
    heads = [1, 2, 3, 4]
    one = make_trainer(make_model(subnetwork_heads=heads), per_device_train_batch_size=12, **options)
    two = make_trainer(
        make_model(subnetwork_heads=heads), per_device_train_batch_size=6, gradient_accumulation_steps=2, **options
    )
    one.train()
    two.train()
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-4)
    assert len(set(losses_of(one))) == 6
    assert_close(weights_of(two.model), weights_of(one.model), rtol=1e-3, atol=1e-5)


def test_weights_that_no_step_uses_are_frozen_if_they_may_be(make_trainer):
    model = make_model(subnetwork_weights=[1, 0])
    before, narrow = weights_of(model), model.extract_subnetwork(3)
    make_trainer(model, weight_decay=0.1, freeze_unused_weights=True).train()
    frozen = weights_of(model)
    assert_equal(shells(frozen, narrow), shells(before, narrow))
    assert all((frozen[name] != weight).any() for name, weight in before.items())
    model.load_state_dict(before)
    make_trainer(model, weight_decay=0.1).train()
    after = shells(weights_of(model), narrow)
    assert any((after[name] != weight).any() for name, weight in shells(before, narrow).items())


def test_training_learns_every_width(make_trainer, images):
    """With all options at once."""
    config = make_config(head_dim=16, subnetwork_heads=[1, 2, 4])
    transform = to_pixel_values(make_image_processor(config))
    data = load_digits()
    trainer = make_trainer(
        HydraViTForImageClassification(config),
        trainer={
            name: data[split].with_transform(transform)
            for name, split in (("train_dataset", "train"), ("eval_dataset", "test"))
        },
        max_steps=60,
        learning_rate=5e-3,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=360,
        **SANDWICH,
        mixup_alpha=0.1,
        cutmix_alpha=0.1,
        ema_decay=0.8,
        freeze_unused_weights=True,
        label_smoothing_factor=0.1,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert all(metrics[f"eval_{num_heads}_heads_accuracy"] > 0.5 for num_heads in (1, 2, 4))


@pytest.mark.parametrize("workers", [0, 1])
def test_each_epoch_has_views_of_its_own(make_trainer, images, workers):
    class Views(TrainingImages):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"epoch": self._epoch.item()}

    epochs = []

    class Model(HydraViTForImageClassification):
        def forward(self, pixel_values, epoch=None, **kwargs):
            epochs.append(set(epoch.tolist()))
            return super().forward(pixel_values, **kwargs)

    augmentation = TrainingAugmentation(make_image_processor(make_config()), rand_augment_magnitude=0)
    trainer = make_trainer(
        Model(make_config()),
        trainer={"train_dataset": Views(images["train"].select(range(24)), augmentation)},
        max_steps=-1,
        num_train_epochs=3,
        per_device_train_batch_size=12,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=bool(workers),
    )
    trainer.train()
    assert epochs == [{0}, {0}, {1}, {1}, {2}, {2}]


# The best model


@pytest.mark.parametrize("ema_decay", [0.0, 0.3])
def test_the_best_model_by_the_mean_over_widths_is_loaded_at_the_end(make_trainer, digits, tmp_path, ema_decay):
    trainer = make_trainer(
        write_model_card=True,
        trainer={"callbacks": [Wreck(step=6)]},
        ema_decay=ema_decay,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="mean_accuracy",
        learning_rate=0.01,
    )
    trainer.train()
    history = {e["step"]: e["eval_mean_accuracy"] for e in trainer.state.log_history if "eval_mean_accuracy" in e}
    best = max(history, key=history.get)
    assert [*history] == [2, 4, 6, 8] and best <= 6 and history[best] > history[8]
    assert trainer.state.best_metric == history[best]
    assert os.path.basename(trainer.state.best_model_checkpoint) == f"checkpoint-{best}"
    assert_equal(weights_of(trainer.model), load_file(Path(trainer.state.best_model_checkpoint, "model.safetensors")))
    assert trainer.evaluate()["eval_mean_accuracy"] == history[best]
    assert metrics_of(trainer.model, digits["test"])["eval_mean_accuracy"] == pytest.approx(history[best])
    check_card(tmp_path / "run", trainer.model, digits["test"], [3, 4])


# The model card


def test_training_leaves_the_card_with_the_accuracy_of_each_width(make_trainer, digits, tmp_path):
    trainer = make_trainer(write_model_card=True, folder="of-digits")
    trainer.train()
    folder = tmp_path / "of-digits"
    assert {file.name for file in folder.iterdir()} == CARD
    check_card(folder, trainer.model, digits["test"], [3, 4])
    text = (folder / "README.md").read_text()
    assert "\n# of-digits\n" in text and "| latency |" in text and "(accuracy_over_macs.png)" in text
    assert own(trainer.evaluate())["eval_3_heads_accuracy"] == pytest.approx(card_in(folder)[0][0]["accuracy"])


def test_the_card_is_that_of_the_averaged_weights_and_of_the_first_dataset(make_trainer, digits, tmp_path):
    parts = {"some": digits["test"][:35], "others": digits["test"][35:]}
    record, trainer = Record(), {"eval_dataset": parts}
    trainer = make_trainer(trainer=trainer | {"callbacks": [record]}, write_model_card=True, ema_decay=0.9)
    trainer.train()
    check_card(tmp_path / "run", trainer.model, parts["some"], [3, 4])
    trained = make_model()
    trained.load_state_dict(record.weights[-1])
    loss, _ = (row["loss"] for row in evaluate_subnetworks(trained, parts["some"]))
    assert abs(card_in(tmp_path / "run")[0][0]["loss"] - loss) > 1e-3  # the weights of the last step differ


def test_no_card_is_written_if_none_is_wanted_or_nothing_is_held_out(make_trainer, tmp_path):
    make_trainer(write_model_card=False, max_steps=1).train()
    make_trainer(write_model_card=True, max_steps=1, trainer={"eval_dataset": None}).train()
    assert not CARD & {file.name for file in (tmp_path / "run").iterdir()}


def test_a_card_that_cannot_be_written_costs_no_training(make_trainer, tmp_path, caplog):
    (tmp_path / "run" / "README.md").mkdir(parents=True)
    trainer = make_trainer(write_model_card=True, max_steps=2)
    assert trainer.train().global_step == 2
    assert "The model card was not written: IsADirectoryError" in caplog.text
    trainer.save_model()
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_the_stock_card_does_not_replace_that_of_training(make_trainer, tmp_path):
    """`push_to_hub` and `create_model_card` write transformers' card."""
    trainer, file = make_trainer(write_model_card=True, max_steps=1), tmp_path / "run" / "README.md"
    trainer.create_model_card()
    stock = file.read_text()
    trainer.train()
    written = file.read_text()
    assert "num_heads_active" in written and "num_heads_active" not in stock
    trainer.create_model_card(model_name="another name")
    assert file.read_text() == written


# Resumption


RESUMED = {
    "weighted, drop path, mixup and CutMix": (
        {"drop_path_rate": 0.3, "hidden_dropout_prob": 0.1, "num_hidden_layers": 2, "subnetwork_weights": [1, 2, 3]},
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    ),
    "sandwich, distillation, averaged weights": ({"drop_path_rate": 0.3}, {**SANDWICH, "ema_decay": 0.9}),
    "frozen weights": ({}, {"freeze_unused_weights": True, "subnetwork_sampling": "uniform", "weight_decay": 0.1}),
    "accumulated gradients": ({"hidden_dropout_prob": 0.1}, {"gradient_accumulation_steps": 2, "mixup_alpha": 0.8}),
    "views": ({"separate_classifiers": True}, {"ema_decay": 0.5, "freeze_unused_weights": True}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_never_interrupted(make_trainer, images, tmp_path, name):
    sizes, options = RESUMED[name]
    options = {"max_steps": 12, "per_device_train_batch_size": 8, "weight_decay": 0.05} | options
    data = {}
    if name == "views":
        augmentation = TrainingAugmentation(make_image_processor(make_config()), rand_augment_magnitude=0)
        data = {"train_dataset": TrainingImages(images["train"], augmentation)}

    def make(folder: str, callbacks=(), **kwargs) -> HydraViTTrainer:
        model = make_model(**{"subnetwork_heads": [1, 2, 4]} | sizes)
        return make_trainer(model, folder, data | {"callbacks": [*callbacks]}, **options | kwargs)

    options |= {"eval_strategy": "steps", "eval_steps": 3}  # an evaluation moves torch's generator
    saves = {"save_strategy": "steps", "save_steps": 4}
    whole = make("whole")
    whole.train()
    with pytest.raises(RuntimeError, match="the power is out"):
        make("interrupted", [Crash(step=9)], **saves).train()
    assert sorted(folder.name for folder in (tmp_path / "interrupted").iterdir()) == ["checkpoint-4", "checkpoint-8"]
    torch.manual_seed(123)
    resumed = make("interrupted", **saves)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert_equal(weights_of(resumed.model), weights_of(whole.model))
    assert losses_of(resumed)[8:] == losses_of(whole)[8:]
    assert_equal(load_file(tmp_path / "interrupted" / "checkpoint-12" / "model.safetensors"), weights_of(whole.model))


def test_a_checkpoint_that_was_not_saved_whole_is_skipped_and_none_is_an_error(make_trainer, tmp_path, caplog):
    whole = make_trainer(folder="whole", max_steps=6)
    whole.train()
    options = {"folder": "killed", "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    make_trainer(**options).train()
    checkpoints = [tmp_path / "killed" / f"checkpoint-{step}" for step in (2, 4, 6)]
    (checkpoints[2] / "trainer_state.json").unlink()
    state = checkpoints[1] / "trainer_state.json"
    text = state.read_text()
    state.write_text(text[: len(text) // 2])
    shutil.copytree(checkpoints[2], tmp_path / "killed" / "checkpoint-6-copy")
    resumed = make_trainer(**options, trainer={"callbacks": [record := Record()]})
    resumed.train(resume_from_checkpoint=True)
    assert [checkpoint.name in caplog.text for checkpoint in checkpoints] == [False, True, True]
    assert "was not saved whole" in caplog.text
    assert len(record.weights) == 4
    assert_equal(weights_of(resumed.model), weights_of(whole.model))
    for checkpoint in checkpoints:
        (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=f"no whole checkpoint to resume from in '{tmp_path / 'killed'}'"):
        make_trainer(**options).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=f"no whole checkpoint to resume from in '{tmp_path / 'new'}'"):
        make_trainer(folder="new").train(resume_from_checkpoint=True)


SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def test_a_run_that_is_resumed_at_its_end_takes_no_more_step(make_trainer, tmp_path):
    trainer = make_trainer(**SAVED)
    trainer.train()
    resumed = make_trainer(trainer={"callbacks": [record := Record()]}, **SAVED)
    assert resumed.train(str(tmp_path / "run" / "checkpoint-4")).global_step == 4
    assert not record.weights
    assert_equal(weights_of(resumed.model), weights_of(trainer.model))


def test_another_run_is_not_resumed_and_is_named(make_trainer, images, digits, tmp_path):
    transform = to_pixel_values(make_image_processor(make_config()))
    data = images["train"].select_columns(["image", "label"])
    make_trainer(trainer={"train_dataset": data.with_transform(transform)}, **SAVED).train()
    shuffled = data.shuffle(seed=1).with_transform(transform)
    names = [f"class {index}" for index in range(10)]
    named = make_model(id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)})
    for model, other, options, message in (
        (None, data.with_transform(transform), {"seed": 7}, r"seed was 42 and is 7\.$"),
        (named, data.with_transform(transform), {}, "id2label was .* and is .*class 3"),
        (None, shuffled, {}, "data was .* and is"),
        (None, digits["train"], {}, "data was .* and is"),
    ):
        trainer = make_trainer(
            model, trainer={"train_dataset": other, "callbacks": [record := Record()]}, **SAVED | options
        )
        with pytest.raises(ValueError, match=f"holds another run than the one to resume: {message}"):
            trainer.train(str(tmp_path / "run" / "checkpoint-2"))
        assert not record.weights


def test_other_batches_of_a_resumed_run_are_a_warning(make_trainer, tmp_path, caplog):
    make_trainer(**SAVED).train()
    make_trainer(**SAVED, per_device_train_batch_size=4).train(str(tmp_path / "run" / "checkpoint-2"))
    assert "Resuming with other images a step and process, 4 instead of 8" in caplog.text
    assert "processes, " not in caplog.text


class Preempt(TrainerCallback):
    """Sends the signal with which a cluster announces the end of a process."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_preempted_saves_a_checkpoint_first_and_is_resumed_as_one_that_was_not(make_trainer, tmp_path):
    whole = make_trainer(folder="whole")
    whole.train()
    options, former = {"save_strategy": "epoch", "eval_strategy": "epoch"}, signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        make_trainer(trainer={"callbacks": [Preempt()]}, write_model_card=True, **options).train()
    assert stop.value.code == 0 and signal.getsignal(signal.SIGTERM) is former
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["checkpoint-3"]  # and no card, for lack of time
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(weights_of(resumed.model), weights_of(whole.model))


def test_a_signal_ends_the_process_again_after_a_training_that_failed(make_trainer):
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="the power is out"):
        make_trainer(trainer={"callbacks": [Crash(step=1)]}).train()
    assert signal.getsignal(signal.SIGTERM) is former


# What can't be trained with


def test_arguments_can_come_from_the_command_line(tmp_path):
    parser = HfArgumentParser(HydraViTTrainingArguments)
    line = f"--output_dir {tmp_path} --subnetwork_sampling sandwich --sandwich_draws 2 --distillation_weight 0.5"
    line += " --ema_decay 0.9 --freeze_unused_weights --eval_heads 3 4 --mixup_alpha 0.8 --cutmix_alpha 1"
    (arguments,) = parser.parse_args_into_dataclasses([*line.split(), "--report_to", "none", "--use_cpu"])
    assert (arguments.subnetwork_sampling, arguments.sandwich_draws, arguments.distillation_weight) == (
        "sandwich",
        2,
        0.5,
    )
    assert (arguments.ema_decay, arguments.freeze_unused_weights, arguments.eval_heads) == (0.9, True, [3, 4])
    assert not arguments.remove_unused_columns and not arguments.ddp_find_unused_parameters
    assert HydraViTTrainingArguments("runs").output_dir == "runs"


def test_options_that_make_no_sense_are_errors_of_the_arguments(tmp_path):
    with pytest.raises(ValueError, match="`distillation_weight` needs subnetwork_sampling='sandwich'"):
        HydraViTTrainingArguments(str(tmp_path), distillation_weight=0.5)


@pytest.mark.parametrize("num_heads", [0, 5, 2.0])
def test_a_width_to_evaluate_must_be_held(make_trainer, num_heads):
    with pytest.raises(ValueError, match="must be an integer from 1 to 4"):
        make_trainer(eval_heads=[3, num_heads])


def test_arguments_of_the_stock_trainer_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="must be HydraViTTrainingArguments, not TrainingArguments"):
        HydraViTTrainer(make_model(), TrainingArguments(str(tmp_path), **QUIET))


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"compute_loss_func": lambda *args, **kwargs: 0}, "`compute_loss_func` is not called"),
        ({"preprocess_logits_for_metrics": lambda logits, labels: logits}, "needs `compute_metrics`"),
    ],
)
def test_functions_that_would_not_be_called_are_an_error(make_trainer, functions, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(trainer=functions)


def test_only_an_optimizer_of_its_own_freezes_unused_weights(make_trainer):
    model = make_model()
    kinds = {
        "optimizers": (torch.optim.SGD(model.parameters()), None),
        "optimizer_cls_and_kwargs": (torch.optim.SGD, {}),
    }
    for name, kind in kinds.items():
        make_trainer(model, trainer={name: kind})
        with pytest.raises(ValueError, match="`freeze_unused_weights` brings an optimizer of its own"):
            make_trainer(model, trainer={name: kind}, freeze_unused_weights=True)


# Several labels, and regressions


def several_labels(digit: int) -> list[float]:
    return [float(digit % 2 == 0), float(digit > 4), float(digit in (2, 3, 5, 7))]


PROBLEMS = {
    "several labels": ({"problem_type": "multi_label_classification", "num_labels": 3}, several_labels),
    "a regression": ({"problem_type": "regression", "num_labels": 2}, lambda digit: [digit / 9, float(digit > 4)]),
    "a regression of one value": ({"num_labels": 1}, lambda digit: digit / 9),
}
LOSSES = {
    "several labels": nn.functional.binary_cross_entropy_with_logits,
    "a regression": nn.functional.mse_loss,
    "a regression of one value": nn.functional.mse_loss,
}


def relabel(items, problem: str) -> list[dict]:
    return [{**item, "labels": PROBLEMS[problem][1](int(item["labels"]))} for item in items]


def targets_of(items) -> torch.Tensor:
    return torch.tensor([item["labels"] for item in items]).reshape(len(items), -1)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("options", [{}, SANDWICH, {"mixup_alpha": 0.4, "cutmix_alpha": 0.4, "ema_decay": 0.5}])
def test_several_labels_and_regressions_are_learnt(make_trainer, digits, problem, options):
    data = {
        f"{name}_dataset": relabel(digits[split], problem) for name, split in (("train", "train"), ("eval", "test"))
    }
    model = make_model(**PROBLEMS[problem][0], head_dim=16, subnetwork_heads=[2, 4])
    sizes = {"per_device_train_batch_size": 42, "write_model_card": True}
    trainer = make_trainer(model, trainer=data, max_steps=40, learning_rate=1e-2, **sizes, **options)
    before, _, after = own(trainer.evaluate()), trainer.train(), own(trainer.evaluate())
    score = {"several labels": "average_precision"}.get(problem, "mse")
    assert {f"eval_{kind}_{score}" for kind in ("2_heads", "4_heads", "mean")} <= after.keys() == before.keys()
    for kind in ("2_heads", "4_heads"):
        first, last = before[f"eval_{kind}_{score}"], after[f"eval_{kind}_{score}"]
        assert last > first + 0.1 if score == "average_precision" else last < first / 1.5, (kind, first, last)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_metrics_of_each_problem_are_those_of_the_extracted_subnetworks(make_trainer, digits, problem):
    items = relabel(digits["test"], problem)
    trainer = make_trainer(make_model(**PROBLEMS[problem][0]), trainer={"eval_dataset": items})
    metrics, targets = trainer.evaluate(), targets_of(items).numpy()
    with torch.no_grad():
        for num_heads in (3, 4):
            logits = logits_of(trainer.model.extract_subnetwork(num_heads), items, num_heads)
            if problem == "several labels":
                precision = average_precision_score(targets, logits.numpy())
                assert metrics[f"eval_{num_heads}_heads_average_precision"] == pytest.approx(precision)
                loss = LOSSES[problem](logits, torch.from_numpy(targets))
                assert metrics[f"eval_{num_heads}_heads_loss"] == pytest.approx(loss.item(), rel=1e-5)
            else:
                error = logits.numpy() - targets
                assert metrics[f"eval_{num_heads}_heads_mse"] == pytest.approx((error**2).mean(), rel=1e-5)
                assert metrics[f"eval_{num_heads}_heads_mae"] == pytest.approx(abs(error).mean(), rel=1e-5)
    prediction = trainer.predict(items)
    assert prediction.predictions.shape == (60, targets.shape[1]) and "test_loss" in prediction.metrics


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_a_step_has_the_loss_of_the_problem_and_of_the_widest_as_a_teacher(make_trainer, digits, problem, weight):
    items, compare = relabel(digits["train"], problem), LOSSES[problem]
    model = make_model(**PROBLEMS[problem][0], subnetwork_heads=[2, 4])
    with torch.no_grad():
        wide, narrow = (logits_of(model, items, num_heads) for num_heads in (4, 2))
    teacher = wide.sigmoid() if problem == "several labels" else wide
    losses = [compare(logits, targets_of(items)) for logits in (wide, narrow)]
    losses[1] = (1 - weight) * losses[1] + weight * compare(narrow, teacher)
    options = ONE_STEP | {"subnetwork_sampling": "sandwich", "distillation_weight": weight}
    trainer = make_trainer(model, trainer={"train_dataset": items}, **options)
    trainer.train()
    assert losses_of(trainer) == pytest.approx([sum(losses).item() / 2], rel=1e-4)


@pytest.mark.parametrize("kind", [float, int, bool])
def test_labels_of_any_kind_of_number_are_several_labels(make_trainer, digits, kind):
    items = [
        {**item, "labels": [kind(value) for value in item["labels"]]}
        for item in relabel(digits["train"], "several labels")
    ]
    model = make_model(**PROBLEMS["several labels"][0])
    trainer = make_trainer(model, trainer={"train_dataset": items, "eval_dataset": items}, max_steps=2, mixup_alpha=0.3)
    trainer.train()
    expected = make_trainer(
        make_model(**PROBLEMS["several labels"][0]),
        trainer={"train_dataset": relabel(digits["train"], "several labels")},
        max_steps=2,
        mixup_alpha=0.3,
    )
    expected.train()
    assert_equal(weights_of(trainer.model), weights_of(expected.model))
    assert trainer.evaluate()["eval_mean_average_precision"] > 0


@pytest.mark.parametrize(
    ("config", "label", "message"),
    [
        ({}, [0.0, 1.0] * 5, r"10 of numbers as its label, which does not fit problem_type='single_label_classif"),
        ({}, 3.0, r"one of numbers as its label, which does not fit problem_type='single_label_classification'"),
        ({}, [1, 0], "2 of integers as its label"),
        (PROBLEMS["several labels"][0], 2, "one of integers as its label.*multi_label_classification' and 3 labels"),
        (PROBLEMS["several labels"][0], [0.0, 1.0], "2 of numbers as its label"),
        (PROBLEMS["a regression"][0], 0.5, "one of numbers as its label, which does not fit problem_type='regression'"),
    ],
)
def test_labels_that_fit_no_problem_are_an_error_before_training(make_trainer, digits, config, label, message):
    items = [{**item, "labels": label} for item in digits["train"]]
    trainer = make_trainer(make_model(**config), trainer={"train_dataset": items, "callbacks": [record := Record()]})
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not record.weights


def test_options_that_a_problem_does_not_have_are_an_error(make_trainer):
    regression, several = (make_model(**PROBLEMS[name][0]) for name in ("a regression", "several labels"))
    for model, options, message in (
        (regression, {"label_smoothing_factor": 0.1}, "smoothes the labels of classes"),
        (several, {"batch_eval_metrics": True}, "`batch_eval_metrics` needs `compute_metrics`"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(model, **options)


# Data


def test_data_that_cannot_be_trained_on_is_an_error_before_training(make_trainer, images):
    transform = to_pixel_values(make_image_processor(make_config()))
    wrong = images["train"].add_column("labels", [10, *range(83)])
    for dataset, message in (
        ([], "dataset is empty"),
        (images["train"].select([]).with_transform(transform), "dataset is empty"),
        (images["train"], r"lack pixel_values; they have image, label\. `hydravit_hf.data.to_pixel_values` makes them"),
        (images["train"].select_columns("image"), "lack pixel_values and labels; they have image"),
        ([{"pixel_values": torch.zeros(3, 8, 8)}], "lack labels; they have pixel_values"),
        (wrong.with_transform(transform), r"from 0 to 9, as the model has 10; the column 'labels' has 10, 11"),
        (TrainingImages(wrong, TrainingAugmentation(make_image_processor(make_config()))), "from 0 to 9"),
    ):
        trainer = make_trainer(trainer={"train_dataset": dataset, "callbacks": [record := Record()]})
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert not record.weights


def test_labels_may_have_another_name_or_be_made_by_a_collator(make_trainer, digits):
    items = [{"pixel_values": item["pixel_values"], "label": item["labels"]} for item in digits["train"]]
    pairs = [(item["pixel_values"], item["labels"]) for item in digits["train"]]

    def collate(pairs):
        return {
            "pixel_values": torch.stack([pixel_values for pixel_values, _ in pairs]),
            "labels": torch.tensor([int(label) for _, label in pairs]),
        }

    expected = make_trainer(max_steps=2)
    expected.train()
    for options in ({"train_dataset": items}, {"train_dataset": pairs, "data_collator": collate}):
        trainer = make_trainer(trainer=options, max_steps=2)
        trainer.train()
        assert_equal(weights_of(trainer.model), weights_of(expected.model))


@pytest.mark.parametrize("options", [{}, SANDWICH])
def test_a_loss_that_is_no_number_stops_the_training_and_names_the_step(make_trainer, digits, options):
    items = [dict(item) for item in digits["train"]]
    items[20]["pixel_values"] = torch.full((3, 8, 8), torch.nan)
    trainer = make_trainer(
        trainer={"train_dataset": items, "callbacks": [record := Record()]},
        train_sampling_strategy="sequential",
        per_device_train_batch_size=8,
        **options,
    )
    with pytest.raises(FloatingPointError, match=r"The loss at step 2, with [34] heads, is nan"):
        trainer.train()
    assert len(record.weights) == 2
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


# Metrics of the user's


class BatchedAccuracy:
    """Accuracy that is added up batch by batch, as `batch_eval_metrics` asks for."""

    def __init__(self):
        self.hits = []

    def __call__(self, prediction, compute_result: bool):
        self.hits += (prediction.predictions.argmax(-1) == prediction.label_ids).tolist()
        if not compute_result:
            return {}
        accuracy, self.hits = sum(self.hits) / len(self.hits), []
        return {"share": accuracy}


def test_metrics_batch_by_batch_are_those_of_all_images_at_every_width(make_trainer):
    whole = make_trainer().evaluate()
    options = {"batch_eval_metrics": True, "per_device_eval_batch_size": 50}
    for metrics, name in ((BatchedAccuracy(), "share"), (None, "accuracy")):
        batched = make_trainer(trainer={"compute_metrics": metrics}, **options).evaluate()
        for expected in (key for key in whole if key.endswith("accuracy")):
            assert batched[expected.replace("accuracy", name)] == pytest.approx(whole[expected])
        assert batched["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-3)


def test_inputs_and_losses_reach_metrics_that_ask_for_them(make_trainer):
    seen = []

    def compute(prediction):
        seen.append((prediction.inputs, prediction.losses))
        return {"loss": float(np.mean(prediction.losses))}

    metrics = make_trainer(trainer={"compute_metrics": compute}, include_for_metrics=["inputs", "loss"]).evaluate()
    expected = make_trainer().evaluate()
    names = [name for name in expected if name.endswith("heads_loss")]
    for (inputs, losses), name in zip(seen, names, strict=True):
        assert inputs.shape[0] == losses.shape[0] == len(make_trainer().eval_dataset)
        assert metrics[name] == pytest.approx(expected[name], rel=1e-2)


def test_a_metric_that_is_no_number_has_no_mean(make_trainer):
    metrics = make_trainer(trainer={"compute_metrics": lambda _: {"matrix": [[1, 2], [3, 4]], "number": 2}}).evaluate()
    assert metrics["eval_4_heads_matrix"] == [[1, 2], [3, 4]]
    assert "eval_mean_matrix" not in metrics and metrics["eval_mean_number"] == 2
