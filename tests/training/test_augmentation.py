"""A view depends on its image and its seed alone and is new in each epoch; images are mixed as their targets say."""

import random
from itertools import product

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hydravit_hf import HydraViTConfig
from hydravit_hf.image_processing import make_image_processor
from hydravit_hf.model.images_hydravit import with_channels
from hydravit_hf.training import augmentation
from hydravit_hf.training.augmentation import (
    CROP_ASPECT,
    OPERATIONS,
    RESAMPLING,
    StreamedTrainingImages,
    TrainingAugmentation,
    TrainingImages,
    draw_rectangle,
    mix_images,
)

OFF = {"crop_scale": (1.0, 1.0), "flip": 0.0, "rand_augment_magnitude": 0, "random_erasing": 0.0}
# Newer Pythons warn of a fork beside threads, torch of a machine of one core
with_workers = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:This DataLoader:UserWarning")


def make_processor(height: int = 16, width: int = 24, channels: int = 3, **kwargs):
    config = HydraViTConfig(image_size=(height, width), patch_size=8, num_channels=channels)
    return make_image_processor(config, **kwargs)


def unit_processor(height: int, width: int, channels: int = 3):
    """A processor that only resizes: its pixel values are from 0 to 1."""
    return make_processor(height, width, channels, image_mean=(0.0,) * channels, image_std=(1.0,) * channels)


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)


def smooth(width: int, height: int) -> Image.Image:
    return noise(6, 5).resize((width, height), Image.Resampling.BICUBIC)


def different(views) -> bool:
    return len({view.numpy().tobytes() for view in views}) == len(views)


# A view is a function of its image and seed


def test_the_same_seed_gives_the_same_view_and_any_other_another():
    augment, image = TrainingAugmentation(make_processor(), random_erasing=1.0), smooth(50, 40)
    seeds = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**40)]
    views = [augment(image, seed) for seed in seeds]
    assert different(views)
    again = TrainingAugmentation(make_processor(), random_erasing=1.0)
    assert all(torch.equal(again(image, seed), view) for seed, view in zip(seeds[::-1], views[::-1], strict=True))


def test_no_global_generator_is_read_or_moved():
    augment, image = TrainingAugmentation(make_processor(), random_erasing=1.0), smooth(50, 40)
    views = []
    for global_seed in (0, 1):
        random.seed(global_seed)
        np.random.seed(global_seed)
        torch.manual_seed(global_seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        views.append(torch.stack([augment(image, (0, seed)) for seed in range(60)]))
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert torch.equal(*views)


IMAGES = {
    "RGB": noise(33, 21),
    "gray": noise(33, 21, 1),
    "RGBA": noise(33, 21, 4),
    "palette": noise(33, 21).quantize(16),
    "black and white": noise(33, 21, 1).convert("1"),
    "CMYK": noise(33, 21).convert("CMYK"),
    "16 bit": Image.fromarray(np.asarray(noise(33, 21, 1)).astype(np.uint16) * 257),
    "one pixel": noise(1, 1),
    "long": noise(200, 3),
}
PROCESSORS = {
    "RGB": make_processor(),
    "gray": make_processor(channels=1),
    "with a crop": make_processor(crop_fraction=0.9),
}


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
def test_views_of_any_image_fit_the_model(image):
    for processor in PROCESSORS.values():
        augment = TrainingAugmentation(processor, random_erasing=0.5)
        for seed in range(10):
            view = augment(image, (seed,))
            assert view.shape == (len(processor.image_mean), 16, 24) and view.dtype == torch.float32
            assert view.isfinite().all()


# What each part does


@pytest.mark.parametrize("mode", ["RGB", "gray", "RGBA", "16 bit"])
def test_a_square_with_everything_off_is_what_the_processor_makes_of_it(mode):
    for processor in (PROCESSORS["RGB"], PROCESSORS["gray"]):
        image = IMAGES[mode].crop((0, 0, 21, 21))
        view = TrainingAugmentation(processor, **OFF)(image, (0,))
        plain = with_channels(image, len(processor.image_mean))
        torch.testing.assert_close(view, processor(plain, return_tensors="pt")["pixel_values"][0], atol=1e-5, rtol=0)


def test_a_processor_that_crops_gives_its_crop_size_without_its_crop():
    augment, plain = (TrainingAugmentation(PROCESSORS[name], **OFF) for name in ("with a crop", "RGB"))
    assert torch.equal(augment(noise(30, 30), (0,)), plain(noise(30, 30), (0,)))


def test_a_crop_is_a_part_of_the_image_of_the_scale_asked_for():
    row, column = np.meshgrid(np.linspace(0, 255, 200), np.linspace(0, 255, 300), indexing="ij")
    ramps = Image.fromarray(np.stack([row, column, 0 * row], axis=-1).astype(np.uint8))
    augment = TrainingAugmentation(unit_processor(64, 64), **OFF | {"crop_scale": (0.2, 0.3)})
    views = torch.stack([augment(ramps, (seed,)) for seed in range(50)])
    heights, widths = (views[:, i].amax((1, 2)) - views[:, i].amin((1, 2)) for i in (0, 1))
    assert (heights * widths > 0.19).all() and (heights * widths < 0.31).all()
    aspects = widths * 300 / (heights * 200)
    assert 0.72 < aspects.min() < 0.8 and 1.25 < aspects.max() < 1.38
    assert views[:, 0].amin((1, 2)).std() > 0.1 and views[:, 1].amin((1, 2)).std() > 0.1


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 7), (100, 60), (9, 300)])
def test_rectangles_lie_in_the_image_and_keep_to_their_aspect(width, height):
    draw, sizes = np.random.default_rng(0), []
    for _ in range(200):
        left, top, right, bottom = draw_rectangle(draw, width, height, (0.08, 1.0), CROP_ASPECT)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        sizes.append((right - left, bottom - top))
    for w, h in sizes:  # up to the rounding of both sides
        assert (w - 0.5) / (h + 0.5) <= CROP_ASPECT and (h - 0.5) / (w + 0.5) <= CROP_ASPECT


def test_a_flip_is_the_mirror_image_and_half_of_the_views_have_one():
    image = noise(20, 20)
    plain, always, half = (TrainingAugmentation(make_processor(), **OFF | {"flip": flip}) for flip in (0, 1, 0.5))
    assert torch.equal(always(image, (0,)), plain(image, (0,)).flip(-1))
    flipped = [torch.equal(half(image, (seed,)), always(image, (0,))) for seed in range(200)]
    unflipped = [torch.equal(half(image, (seed,)), plain(image, (0,))) for seed in range(200)]
    assert 70 < sum(flipped) < 130 and sum(flipped) + sum(unflipped) == 200


FILL = (124, 116, 104)
BILINEAR, BICUBIC = RESAMPLING


def distort(image, operation, level, fill=FILL, resample=BILINEAR):
    return OPERATIONS[operation](image, level, resample=resample, fillcolor=fill)


def equalized(x):
    """In each channel, the share of pixels below, in 255 parts of what isn't the lightest."""
    step = (len(x) - (x == x.max(0)).sum(0)) // 255
    below = np.stack([np.searchsorted(np.sort(channel), channel) for channel in x.T], axis=-1)
    return (below + step // 2) // step


def smoothed(x):
    """The mean of 3 x 3 pixels, with the middle one counted five times; the edge stays."""
    x = x.reshape(60, 72, 3).copy()
    x[1:-1, 1:-1] = (sum(x[i : i + 58, j : j + 70] for i in range(3) for j in range(3)) + 4 * x[1:-1, 1:-1]) / 13
    return x.reshape(-1, 3)


LUMA = np.array([[0.299], [0.587], [0.114]])
# Of pixels x (H * W, 3) from 0 to 255, a strength s from 0 to 1 and a factor f from 0.1 to 1.9
BY_NUMPY = {
    "auto_contrast": lambda x, s, f: (x - x.min(0)) / (x.max(0) - x.min(0)) * 255,
    "equalize": lambda x, s, f: equalized(x),
    "invert": lambda x, s, f: 255 - x,
    "posterize": lambda x, s, f: x // 2 ** (4 + int(4 * s)) * 2 ** (4 + int(4 * s)),
    "solarize": lambda x, s, f: np.where(x < 256 - int(256 * s), x, 255 - x),
    "solarize_add": lambda x, s, f: np.where(x < 128, x + int(110 * s), x),
    "color": lambda x, s, f: x @ LUMA * (1 - f) + x * f,
    "contrast": lambda x, s, f: (x @ LUMA).mean() * (1 - f) + x * f,
    "brightness": lambda x, s, f: x * f,
    "sharpness": lambda x, s, f: smoothed(x) * (1 - f) + x * f,
}


@pytest.mark.parametrize("operation", BY_NUMPY)
def test_an_operation_on_colors_is_what_numpy_makes_of_them(operation):
    image = noise(72, 60).point(lambda value: 20 + value * 7 // 8)  # neither black nor white
    pixels = np.asarray(image).reshape(-1, 3).astype(float)
    for level in (0.99, 0.65, -0.31, -0.9):
        expected = BY_NUMPY[operation](pixels, abs(level), 1 + 0.9 * level).clip(0, 255)
        result = np.asarray(distort(image, operation, level)).reshape(-1, 3)
        exact = operation in ("equalize", "invert", "posterize", "solarize", "solarize_add")
        np.testing.assert_allclose(result, expected, rtol=0, atol=0 if exact else 1.5)
        assert abs(expected - pixels).mean() > 5


# Where the pixel at x, y from the middle comes from, for a level and a width or height
MOVES = {
    "rotate": lambda x, y, level, w, h: (
        np.cos(np.pi / 6 * level) * x - np.sin(np.pi / 6 * level) * y,
        np.sin(np.pi / 6 * level) * x + np.cos(np.pi / 6 * level) * y,
    ),
    "shear_x": lambda x, y, level, w, h: (x + 0.3 * level * (y + h / 2), y),
    "shear_y": lambda x, y, level, w, h: (x, y + 0.3 * level * (x + w / 2)),
    "translate_x": lambda x, y, level, w, h: (x + 0.45 * level * w, y),
    "translate_y": lambda x, y, level, w, h: (x, y + 0.45 * level * h),
}


@pytest.mark.parametrize("operation", MOVES)
def test_an_operation_that_moves_pixels_takes_them_from_where_it_should(operation):
    w, h = 72, 60
    y, x = np.mgrid[:h, :w]
    places = Image.fromarray(np.stack([3 * x, 4 * y, 0 * x], axis=-1).astype(np.uint8))  # each pixel tells its place
    for level, resample in product((1, 0.31, -0.9), RESAMPLING):
        result = np.asarray(distort(places, operation, level, FILL, resample)).astype(float)
        from_x, from_y = MOVES[operation](x + 0.5 - w / 2, y + 0.5 - h / 2, level, w, h)
        from_x, from_y = from_x + w / 2, from_y + h / 2
        inside = (from_x > 2) & (from_x < w - 2) & (from_y > 2) & (from_y < h - 2)
        error = 1 if resample == BILINEAR else 2  # of 3 or 4 from pixel to pixel; Pillow's bicubic bends ramps a little
        np.testing.assert_allclose(result[inside, 0], 3 * (from_x[inside] - 0.5), atol=error)
        np.testing.assert_allclose(result[inside, 1], 4 * (from_y[inside] - 0.5), atol=error)
        outside = (from_x < -1e-6) | (from_x > w + 1e-6) | (from_y < -1e-6) | (from_y > h + 1e-6)
        assert (result[outside] == FILL).all() and outside.any() and inside.mean() > 0.4


def test_pixels_that_move_are_interpolated_as_asked():
    for operation in MOVES:
        one, other = (distort(noise(24, 16), operation, 0.43, FILL, resample) for resample in RESAMPLING)
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).mean() > 1


def test_level_zero_is_the_weakest_and_one_the_strongest_that_pillow_takes():
    image = noise(24, 16)
    for operation in OPERATIONS:
        weakest, strongest = (distort(image, operation, level, FILL, BICUBIC) for level in (0, 1))
        assert weakest == image or operation in ("auto_contrast", "equalize", "invert", "posterize"), operation
        assert strongest != image and np.asarray(strongest).std() > 0, operation


def test_the_least_factor_is_a_tenth_and_posterize_keeps_a_bit():
    image, pixels = noise(24, 16), np.asarray(noise(24, 16))
    np.testing.assert_allclose(np.asarray(distort(image, "brightness", -1)), pixels * 0.1, atol=1)
    np.testing.assert_array_equal(np.asarray(distort(image, "posterize", 1)), pixels & 128)


def test_operations_leave_a_plain_image_plain():
    image = Image.new("RGB", (8, 8), (150, 150, 150))
    for operation in ("auto_contrast", "equalize", "color", "contrast", "sharpness"):
        assert distort(image, operation, 0.9) == image


def test_an_operation_on_gray_is_that_on_three_equal_channels():
    gray = smooth(24, 16).convert("L")
    for operation, level in product(OPERATIONS, (0.9, -0.9)):
        one = distort(gray, operation, level, (104,), BICUBIC)
        three = distort(gray.convert("RGB"), operation, level, (104,) * 3, BICUBIC)
        assert one.mode == "L" and one.convert("RGB") == three, operation


def test_operations_are_drawn_as_in_rand_m9_mstd05_inc1(monkeypatch):
    drawn = []

    def record(operation):
        return lambda image, level, resample, fillcolor: drawn.append((operation, level, resample)) or image

    monkeypatch.setattr(augmentation, "OPERATIONS", {name: record(name) for name in OPERATIONS})
    augment = TrainingAugmentation(unit_processor(8, 8), **OFF | {"rand_augment_magnitude": 9})
    counts = []
    for seed in range(1500):
        start = len(drawn)
        augment(noise(8, 8), (seed,))
        counts.append(len(drawn) - start)
    shares = np.bincount(counts, minlength=3) / len(counts)
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.04)
    names, levels, resamples = zip(*drawn, strict=True)
    assert {name: names.count(name) > 60 for name in OPERATIONS} == dict.fromkeys(OPERATIONS, True)
    assert set(resamples) == set(RESAMPLING)
    assert 0.45 < resamples.count(BILINEAR) / len(drawn) < 0.55
    levels = np.array(levels)
    assert abs((levels > 0).mean() - 0.5) < 0.05
    assert abs(levels).max() == 1 and abs(abs(levels).mean() - 0.9) < 0.01 and abs(abs(levels).std() - 0.05) < 0.01


def test_rand_augment_changes_views_the_more_the_larger_its_magnitude():
    image, changes = smooth(24, 16), []
    for magnitude in (0, 3, 9):
        augment = TrainingAugmentation(
            unit_processor(16, 24), **OFF | {"rand_augment_magnitude": magnitude, "rand_augment_num_ops": 4}
        )
        plain = TrainingAugmentation(unit_processor(16, 24), **OFF)
        changes.append(sum((augment(image, (s,)) - plain(image, (s,))).abs().mean() for s in range(100)))
    assert changes[0] == 0 and changes[2] > changes[1] > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_that_move_in_have_the_mean_color_of_the_processor(monkeypatch, channels):
    monkeypatch.setattr(augmentation, "OPERATIONS", {"translate_x": OPERATIONS["translate_x"]})
    processor = make_processor(16, 16, channels)
    augment = TrainingAugmentation(processor, **OFF | {"rand_augment_magnitude": 9})
    white = Image.new("RGB", (16, 16), "white")
    views = torch.stack([augment(white, (seed,)) for seed in range(20)])
    moved_in = views.amin((2, 3))[views.amin((1, 2, 3)) < 0.1]
    assert 5 < len(moved_in) < 20
    assert (moved_in.abs() * torch.tensor(processor.image_std) <= 0.5001 / 255).all()  # normalised, the mean is 0


def test_erasing_turns_one_rectangle_into_noise_and_touches_nothing_else():
    always, never, sometimes = (TrainingAugmentation(make_processor(32, 32), random_erasing=p) for p in (1, 0, 0.25))
    erased_pixels, areas, erased = [], [], 0
    for seed in range(300):
        one, other = always(smooth(50, 40), (seed,)), never(smooth(50, 40), (seed,))
        changed = (one != other).any(0)
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        assert changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        erased_pixels.append(one[:, changed].flatten())
        areas.append(changed.float().mean())
        erased += not torch.equal(sometimes(smooth(50, 40), (seed,)), other)
    pixels, areas = torch.cat(erased_pixels), torch.stack(areas)
    assert abs(pixels.mean()) < 0.02 and abs(pixels.std() - 1) < 0.02
    assert 0.015 < areas.min() < 0.05 and 0.28 < areas.max() < 0.36
    assert 50 < erased < 100


# Errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"flip": 1.5}, "`flip` must be from 0 to 1, not 1.5"),
        ({"flip": float("nan")}, "`flip`"),
        ({"random_erasing": -0.1}, "`random_erasing` must be from 0 to 1, not -0.1"),
        ({"rand_augment_magnitude": 11}, "`rand_augment_magnitude` must be from 0 to 10, not 11"),
        ({"rand_augment_num_ops": -1}, "`rand_augment_num_ops`"),
        ({"crop_scale": (0.0, 1.0)}, r"`crop_scale` must increase.*\(0.0, 1.0\)"),
        ({"crop_scale": (0.5, 0.2)}, "`crop_scale`"),
        ({"crop_scale": (0.5, 1.1)}, "`crop_scale`"),
    ],
)
def test_a_number_out_of_its_range_is_an_error_that_names_it(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TrainingAugmentation(make_processor(), **kwargs)


def test_a_processor_without_a_fixed_output_size_is_an_error():
    processor = make_processor(crop_fraction=0.9)
    processor.do_center_crop = False
    with pytest.raises(ValueError, match="shortest_edge"):
        TrainingAugmentation(processor)


# Data sets


@pytest.fixture
def digits(images):
    return images["train"].select(range(24))


@pytest.fixture
def augment():
    """With noise in every view, so that no two are equal by chance."""
    return TrainingAugmentation(make_processor(8, 8), random_erasing=1.0)


def load(images, **kwargs) -> torch.Tensor:
    """All views (N, C, H, W), in the order in which a loader gives them."""
    return torch.cat([batch["pixel_values"] for batch in DataLoader(images, batch_size=4, **kwargs)])


def test_items_are_views_with_their_labels(digits, augment):
    images = TrainingImages(digits, augment, seed=3)
    assert len(images) == 24 and [item["labels"] for item in images] == digits["label"]
    images.set_epoch(2)
    assert torch.equal(images[5]["pixel_values"], augment(digits[5]["image"], (3, 2, 5)))
    assert torch.equal(images[-1]["pixel_values"], images[23]["pixel_values"])


@with_workers
def test_views_are_the_same_from_any_number_of_workers_and_new_in_each_epoch(digits, augment):
    images, epochs = TrainingImages(digits, augment), []
    for epoch in range(2):
        images.set_epoch(epoch)
        alone, together = load(images), load(images, num_workers=2)
        assert torch.equal(alone, together)
        epochs.append(alone)
    assert not any(torch.equal(one, other) for one, other in zip(*epochs, strict=True))
    images.set_epoch(0)
    assert torch.equal(load(images), epochs[0])
    assert not torch.equal(load(TrainingImages(digits, augment, seed=1)), epochs[0])


@with_workers
def test_workers_that_persist_learn_of_a_new_epoch(digits, augment):
    images = TrainingImages(digits, augment)
    loader = DataLoader(images, batch_size=4, num_workers=2, persistent_workers=True)
    for epoch in range(2):
        images.set_epoch(epoch)
        together = torch.cat([batch["pixel_values"] for batch in loader])
        assert torch.equal(together, load(images))


def test_equal_images_in_a_batch_get_different_draws(digits, augment):
    assert different(load(TrainingImages(digits.select([0] * 12), augment)))


def test_a_loader_of_accelerate_passes_its_epoch_on(digits, augment):
    images = TrainingImages(digits, augment)
    loader = prepare_data_loader(DataLoader(images, batch_size=4), num_processes=1, process_index=0)
    loader.set_epoch(3)
    views = torch.cat([batch["pixel_values"] for batch in loader])
    assert torch.equal(views[7], augment(digits[7]["image"], (0, 3, 7)).to(views.device))


def test_a_batch_of_views_trains_a_model(digits, augment, make_model):
    model = make_model(image_size=8, num_labels=10).train()
    loader = DataLoader(TrainingImages(digits, augment), batch_size=8, collate_fn=default_data_collator)
    batch = next(iter(loader))
    assert batch["labels"].tolist() == digits[:8]["label"]
    model(**batch).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


# Streams


@pytest.fixture
def numbered():
    """24 equal images, whose labels are their numbers."""
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    return Dataset.from_dict({"image": [smooth(12, 12)] * 24, "label": range(24)}, features=features)


def by_label(loader) -> dict[int, torch.Tensor]:
    """Views by their labels, each of which comes once."""
    items = [item for batch in loader for item in zip(batch["labels"].tolist(), batch["pixel_values"], strict=True)]
    assert len(dict(items)) == len(items)
    return dict(items)


@with_workers
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_gives_each_image_once_an_epoch_and_a_new_view_in_each(tmp_path, numbered, augment, num_workers):
    for number in range(3):
        numbered.shard(3, number).to_parquet(tmp_path / f"{number}.parquet")
    files, cache = str(tmp_path / "*.parquet"), str(tmp_path / "cache")
    stream = load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=cache)
    images = StreamedTrainingImages(stream, augment)
    loader = DataLoader(images, batch_size=4, num_workers=num_workers, persistent_workers=num_workers > 0)
    epochs = []
    for epoch in (0, 1, 0):
        images.set_epoch(epoch)
        epochs.append(by_label(loader))
        assert sorted(epochs[-1]) == list(range(24))
    assert different([*epochs[0].values(), *epochs[1].values()])
    assert all(torch.equal(epochs[0][label], epochs[2][label]) for label in range(24))


def test_a_new_epoch_shuffles_a_stream_anew(numbered, augment):
    stream = numbered.to_iterable_dataset(num_shards=3).shuffle(seed=0, buffer_size=8)
    images, orders = StreamedTrainingImages(stream, augment), []
    for epoch in (0, 1, 0):
        images.set_epoch(epoch)
        orders.append([item["labels"] for item in images])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(24))
    assert orders[0] == orders[2] != orders[1]


def test_processes_that_share_a_stream_draw_differently(numbered, augment):
    parts, stream = [], numbered.to_iterable_dataset(num_shards=3)
    for rank in range(3):
        images = StreamedTrainingImages(split_dataset_by_node(stream, rank=rank, world_size=3), augment)
        parts.append(by_label(DataLoader(images, batch_size=4)))
    assert sorted(label for part in parts for label in part) == list(range(24))
    assert different([view for part in parts for view in part.values()])


@with_workers
def test_a_folder_of_images_can_be_streamed(tmp_path, augment):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            smooth(12, 12).save(tmp_path / "data" / name / f"{number}.png")
    folder, cache = str(tmp_path / "data"), str(tmp_path / "cache")
    stream = load_dataset("imagefolder", data_dir=folder, split="train", streaming=True, cache_dir=cache)
    batches = list(DataLoader(StreamedTrainingImages(stream, augment), batch_size=2, num_workers=2))
    assert sorted(torch.cat([batch["labels"] for batch in batches]).tolist()) == [0] * 4 + [1] * 4
    assert different([view for batch in batches for view in batch["pixel_values"]])


# Mixed images


def make_constant_images(classes: int, size: tuple[int, int] = (6, 10)) -> tuple[torch.Tensor, torch.Tensor]:
    """An image of each class, of which every pixel is the class."""
    labels = torch.randperm(classes)
    return labels.float()[:, None, None, None].expand(-1, 3, *size).clone(), labels


def shares(pixel_values: torch.Tensor, classes: int) -> torch.Tensor:
    """The part of each image's pixels that are of each class."""
    return torch.stack([(pixel_values == label).float().mean((1, 2, 3)) for label in range(classes)], dim=1)


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.3, 0.3), (1e-3, 1e-3)])
def test_targets_of_mixed_images_are_the_parts_that_the_classes_have_in_the_pixels(alphas):
    classes = 12
    pixel_values, labels = make_constant_images(classes)
    one_hot = nn.functional.one_hot(labels, classes).float()[:, :, None, None].expand(-1, -1, 6, 10)
    methods = set()
    for seed in range(20):
        mixed, targets = mix_images(pixel_values, labels, classes, [seed, 1], *alphas)
        torch.testing.assert_close(targets.sum(-1), torch.ones(classes))
        assert (targets >= 0).all() and ((targets > 0).sum(-1) <= 2).all()
        # the mean pixel of an image of constants, and the mean of each channel of one-hot images
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(classes).float())
        parts, same_targets = mix_images(one_hot, labels, classes, [seed, 1], *alphas)
        assert torch.equal(same_targets, targets)
        torch.testing.assert_close(parts.mean((2, 3)), targets)
        is_cut = (shares(mixed, classes) - targets).abs().amax(-1) < 1e-5
        is_mixed = mixed.flatten(1).std(1) < 1e-5
        assert (is_cut | is_mixed).all()
        methods |= {"cutmix"} if (~is_mixed).any() else set()
        methods |= {"mixup"} if (~is_cut).any() else set()
    assert methods == {name for name, alpha in zip(("mixup", "cutmix"), alphas, strict=True) if alpha}


def test_a_part_that_is_cut_in_is_one_rectangle():
    pixel_values, labels = make_constant_images(8)
    for seed in range(30):
        mixed, _ = mix_images(pixel_values, labels, 8, [seed], cutmix_alpha=1.0)
        for image, label in zip(mixed, labels, strict=True):
            foreign = image[0] != label
            assert all(torch.equal(channel, image[0]) for channel in image)
            assert torch.equal(foreign, foreign.any(1, keepdim=True) & foreign.any(0, keepdim=True))
            for side in (foreign.any(0), foreign.any(1)):
                places = side.nonzero().flatten()
                assert len(places) == 0 or places[-1] - places[0] + 1 == len(places)


def test_each_mixing_method_has_half_of_the_images_and_each_image_a_draw_of_its_own():
    classes = 200
    pixel_values, labels = make_constant_images(classes)
    mixed, targets = mix_images(pixel_values, labels, classes, [0], 1.0, 1.0)
    is_mixed = mixed.flatten(1).std(1) < 1e-4
    assert abs(is_mixed.sum() - 100) < 40
    own = targets[torch.arange(classes), labels]
    assert len(own.unique()) > 120
    partners = targets.scatter(1, labels[:, None], 0).argmax(-1)[own < 1]
    assert len(partners.unique()) == len(partners)  # each image is a partner once


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_shares_of_mixup_have_the_distribution_that_its_alpha_says(alpha):
    pixel_values, labels = make_constant_images(2000, (1, 1))
    _, targets = mix_images(pixel_values, labels, 2000, [5], mixup_alpha=alpha)
    own = targets[torch.arange(2000), labels].double()
    assert own.mean() == pytest.approx(0.5, abs=0.05)
    assert own.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mixing_is_a_function_of_the_seed_that_changes_nothing_in_place(dtype):
    pixel_values, labels = torch.randn(9, 3, 8, 4).to(dtype), torch.randint(5, (9,))
    given, states = (pixel_values.clone(), labels.clone()), (np.random.get_state()[1].tolist(), torch.get_rng_state())
    mixed, targets = mix_images(pixel_values, labels, 5, [3, 1], 0.8, 1.0)
    assert torch.equal(pixel_values, given[0]) and torch.equal(labels, given[1])
    assert np.random.get_state()[1].tolist() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert mixed.shape == pixel_values.shape and mixed.dtype == dtype
    assert targets.shape == (9, 5) and targets.dtype == torch.float32
    torch.manual_seed(1)
    again = mix_images(pixel_values, labels, 5, [3, 1], 0.8, 1.0)
    assert torch.equal(mixed, again[0]) and torch.equal(targets, again[1])
    for seed in ([3, 2], [4, 1], [3]):
        assert not torch.equal(mixed, mix_images(pixel_values, labels, 5, seed, 0.8, 1.0)[0])
    tolerance = {"atol": 0.05, "rtol": 0.05} if dtype == torch.bfloat16 else {}
    single = mix_images(pixel_values.float(), labels, 5, [3, 1], 0.8, 1.0)[0]
    torch.testing.assert_close(mixed.float(), single, **tolerance)


def test_one_image_is_its_own_partner():
    image = torch.randn(1, 3, 8, 8)
    mixed, targets = mix_images(image, torch.tensor([2]), 4, [0], 0.8, 1.0)
    torch.testing.assert_close(mixed, image)
    torch.testing.assert_close(targets, torch.tensor([[0.0, 0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("alphas", [(0.3, 0.0), (0.0, 1.0), (0.3, 1.0)])
def test_labels_that_are_numbers_are_mixed_as_the_images_are(alphas):
    pixel_values, labels = torch.rand(12, 3, 8, 8), torch.arange(12) % 4
    images, expected = mix_images(pixel_values, labels, 4, [0], *alphas)
    same, found = mix_images(pixel_values, torch.eye(4)[labels], 4, [0], *alphas)
    assert torch.equal(images, same) and torch.equal(found, expected)
    _, values = mix_images(pixel_values, labels.float(), 1, [0], *alphas)
    torch.testing.assert_close(values, expected @ torch.arange(4.0)[:, None])


def test_mixing_needs_a_method():
    with pytest.raises(ValueError, match="`mixup_alpha` or `cutmix_alpha` must be above 0"):
        mix_images(*make_constant_images(3), 3, [0])
