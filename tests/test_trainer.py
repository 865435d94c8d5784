"""The stock Trainer trains every width, with no argument of ours."""

from transformers import Trainer, TrainingArguments

from hydravit_hf import HydraViTConfig, HydraViTForImageClassification, evaluate_subnetworks, make_image_processor
from hydravit_hf.data import load_digits, to_pixel_values


def test_the_stock_trainer_trains_every_width_and_saves_a_checkpoint_that_loads_at_any(tmp_path):
    config = HydraViTConfig(
        num_attention_heads=4, head_dim=16, num_hidden_layers=1, image_size=8, patch_size=4, num_labels=10
    )
    model = HydraViTForImageClassification(config)
    data = load_digits().with_transform(to_pixel_values(make_image_processor(config)))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=120,
        learning_rate=3e-3,
        per_device_train_batch_size=32,
        remove_unused_columns=False,  # the transform makes the columns that the model wants
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=data["train"], processing_class=make_image_processor(config))
    trainer.train()
    trainer.save_model()
    rows = evaluate_subnetworks(model, data["test"], heads=[3, 4])
    assert all(row["accuracy"] > 0.6 for row in rows)  # chance is 0.1
    for row in rows:
        loaded = HydraViTForImageClassification.from_pretrained(tmp_path, num_attention_heads=row["num_heads"])
        (again,) = evaluate_subnetworks(loaded, data["test"], heads=[row["num_heads"]])
        assert again["accuracy"] == row["accuracy"]
