"""`lora_config` configures an adapter of few parameters, which every trainer trains and saves."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from support.training import QUIET, SANDWICH, assert_equal, make_model, weights_of
from transformers import Trainer, TrainingArguments

from hydravit_hf import (
    HydraViTConfig,
    HydraViTForImageClassification,
    HydraViTTrainer,
    HydraViTTrainingArguments,
    ModelCardCallback,
    make_image_processor,
)
from hydravit_hf.data import load_digits, to_pixel_values

peft = pytest.importorskip("peft")
from hydravit_hf.lora import lora_config  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks for it by the earlier name
STEPS = {"max_steps": 6, "learning_rate": 1e-2, "save_steps": 3, "save_strategy": "steps", "logging_steps": 1}


@pytest.fixture
def base(tmp_path):
    make_model(subnetwork_heads=[1, 2, 4]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def digits(base):
    config = HydraViTConfig.from_pretrained(base)
    return load_digits().with_transform(to_pixel_values(make_image_processor(config)))


def adapt(base):
    torch.manual_seed(0)
    return peft.get_peft_model(HydraViTForImageClassification.from_pretrained(base), lora_config(r=2))


def check_saved(folder, model, digits):
    """A saved adapter answers at every width as the model that was trained, and has changed nothing else."""
    images = torch.stack([item["pixel_values"] for item in [*digits["test"]][:8]])
    loaded = HydraViTForImageClassification.from_pretrained(folder)
    for num_heads in (1, 2, 4):
        found = loaded(images, num_heads_active=num_heads).logits
        expected = model.eval()(pixel_values=images, num_heads_active=num_heads).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    narrow = HydraViTForImageClassification.from_pretrained(folder, num_attention_heads=1)
    torch.testing.assert_close(narrow(images).logits, loaded(images, num_heads_active=1).logits, atol=1e-5, rtol=0)


def test_the_default_adapter_trains_less_than_a_hundredth_of_a_large_model():
    model = HydraViTForImageClassification(HydraViTConfig(num_hidden_layers=2))
    adapted = peft.get_peft_model(model, lora_config(r=4))
    trained, total = adapted.get_nb_trainable_parameters()
    assert trained < 0.01 * total
    names = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-4] for name in names if "lora" in name} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    }
    assert {name.split(".")[2] for name in names if "lora" not in name} == {"classifier"}


@pytest.mark.parametrize(
    ("kwargs", "saved"),
    [
        ({}, {"classifier"}),
        ({"target_modules": "all-linear"}, None),  # which has the classifier in it
        ({"target_modules": ["q_proj", "classifier"]}, None),
        ({"modules_to_save": None}, None),
        ({"modules_to_save": ["layernorm"]}, {"layernorm"}),
    ],
)
def test_the_classifier_is_trained_whole_unless_something_else_is_said(kwargs, saved):
    config = lora_config(**kwargs)
    assert (config.modules_to_save and set(config.modules_to_save)) == saved
    peft.get_peft_model(make_model(), config)


def test_the_scale_follows_the_rank_unless_it_is_given():
    assert lora_config(r=3).lora_alpha == 6
    assert lora_config(r=3, lora_alpha=5).lora_alpha == 5


def test_the_stock_trainer_trains_an_adapter_and_keeps_the_best(base, digits, tmp_path):
    args = TrainingArguments(
        tmp_path / "out",
        remove_unused_columns=False,
        eval_strategy="steps",
        load_best_model_at_end=True,
        **STEPS,
        **QUIET,
    )
    card = ModelCardCallback(digits["test"])
    trainer = Trainer(adapt(base), args, train_dataset=digits["train"], eval_dataset=digits["test"], callbacks=[card])
    trainer.train()
    trainer.save_model()
    check_saved(tmp_path / "out", trainer.model, digits)
    assert (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    "options",
    [{}, SANDWICH, {"teacher": True}, {"ema_decay": 0.9}, {"activation_checkpointing": True}],
    ids=["one width", "sandwich", "teacher", "averaged", "checkpointing"],
)
def test_our_trainer_trains_an_adapter_and_resumes(base, digits, tmp_path, options):
    options = {**options}
    teacher = make_model().to_vit(4) if options.pop("teacher", False) else None

    def train(resume=None):
        args = HydraViTTrainingArguments(tmp_path / "out", **STEPS, **QUIET, **options)
        data = {"train_dataset": digits["train"], "eval_dataset": digits["test"], "teacher": teacher}
        trainer = HydraViTTrainer(adapt(base), args, **data)
        before = weights_of(trainer.model)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, before

    trainer, before = train()
    trainer.save_model()
    after = weights_of(trainer.model)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {name for name in after if not torch.equal(after[name], before[name])} == trained
    check_saved(tmp_path / "out", trainer.model, digits)
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    again, _ = train(resume=True)
    assert_equal(weights_of(again.model), after)


def test_the_optimizer_of_leading_heads_says_that_it_takes_no_adapter(base, digits, tmp_path):
    args = HydraViTTrainingArguments(tmp_path / "out", freeze_unused_weights=True, **STEPS, **QUIET)
    with pytest.raises(ValueError, match=r"freeze_unused_weights.*adapter"):
        HydraViTTrainer(adapt(base), args, train_dataset=digits["train"])


@pytest.mark.filterwarnings("ignore:.*adapters were merged")
def test_the_snippet_of_the_page_runs_and_the_widths_agree(base, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "lora.md").read_text(encoding="utf-8")
    make_model(num_attention_heads=12, subnetwork_heads=None).save_pretrained(tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall("```python\n(.*?)```", page, flags=re.DOTALL)
    names = {}
    exec(compile(snippet, "docs/lora.md", "exec"), names)
    distance = float(re.search(r"tensor\(([^,)]*)", capsys.readouterr().out)[1])
    assert distance < 1e-5
    small = HydraViTForImageClassification.from_pretrained("runs/merged-3-heads")
    torch.testing.assert_close(small(names["images"]).logits, names["small"](names["images"]).logits)


def test_an_adapter_of_other_labels_is_an_error_and_never_other_answers(base, tmp_path):
    kwargs = {"num_labels": 3, "ignore_mismatched_sizes": True}
    model = HydraViTForImageClassification.from_pretrained(base, **kwargs)
    peft.get_peft_model(model, lora_config(r=2)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(RuntimeError):
        HydraViTForImageClassification.from_pretrained(tmp_path / "adapter")
    loaded = HydraViTForImageClassification.from_pretrained(tmp_path / "adapter", **kwargs)
    assert loaded.config.num_labels == 3
