"""Random views of images for training, as in the original recipe (timm's `rand-m9-mstd0.5-inc1`), drawn for each image.

A view is a function of the image and a seed: numpy's generator draws, and no global generator is read or moved. So a
view depends neither on the process that makes it nor on the images before it, and a resumed run sees it again.
Letters: C channels, H height, W width.
"""

import math

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import get_worker_info

from .pipeline_hydravit import with_channels

MAX_MAGNITUDE, MAGNITUDE_STD = 10, 0.5
RESAMPLING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
CROP_ASPECT = 4 / 3
ERASED_ASPECT, ERASED_AREA = 1 / 0.3, (0.02, 1 / 3)


def transform(image: Image.Image, *matrix: float, **how) -> Image.Image:
    """What is at x, y comes from ax + by + c, dx + ey + f."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **how)


# RandAugment's, on an RGB or gray image. The level is from 0 to ± 1, the strongest; its sign is the direction, where an
# operation has one. `how` pixels move: `resample`, and `fillcolor` for what comes in from outside.
OPERATIONS = {
    "auto_contrast": lambda image, level, **how: ImageOps.autocontrast(image),
    "equalize": lambda image, level, **how: ImageOps.equalize(image),
    "invert": lambda image, level, **how: ImageOps.invert(image),
    "posterize": lambda image, level, **how: ImageOps.posterize(image, max(1, 4 - int(4 * abs(level)))),
    "solarize": lambda image, level, **how: ImageOps.solarize(image, 256 - int(256 * abs(level))),
    "solarize_add": lambda image, level, **how: image.point(lambda x: x + int(110 * abs(level)) * (x < 128)),
    "color": lambda image, level, **how: ImageEnhance.Color(image).enhance(max(0.1, 1 + 0.9 * level)),
    "contrast": lambda image, level, **how: ImageEnhance.Contrast(image).enhance(max(0.1, 1 + 0.9 * level)),
    "brightness": lambda image, level, **how: ImageEnhance.Brightness(image).enhance(max(0.1, 1 + 0.9 * level)),
    "sharpness": lambda image, level, **how: ImageEnhance.Sharpness(image).enhance(max(0.1, 1 + 0.9 * level)),
    "rotate": lambda image, level, **how: image.rotate(30 * level, **how),
    "shear_x": lambda image, level, **how: transform(image, 1, 0.3 * level, 0, 0, 1, 0, **how),
    "shear_y": lambda image, level, **how: transform(image, 1, 0, 0, 0.3 * level, 1, 0, **how),
    "translate_x": lambda image, level, **how: transform(image, 1, 0, 0.45 * level * image.width, 0, 1, 0, **how),
    "translate_y": lambda image, level, **how: transform(image, 1, 0, 0, 0, 1, 0.45 * level * image.height, **how),
}


class TrainingAugmentation:
    """A random view of an image, as `pixel_values`: a crop, a flip, RandAugment, colour jitter, an erased rectangle.

    RandAugment is timm's: Pillow's operations are drawn with replacement, each is skipped with odds of a half, and a
    larger magnitude is always the stronger change (9 of 10: a turn by 27 degrees). What differs from timm: crops are
    resized as the processor does it, that of a long image may lie off its middle, an erased rectangle may touch both
    sides, and posterizing keeps a bit at least, as Pillow demands. timm leaves out colour jitter beside RandAugment,
    so the 0.3 in the original's settings had no effect; hence none here.

    Args:
        processor: The model's image processor: its output size (`crop_size`, if it crops), resampling, mean and
            standard deviation. RGB or gray.
        crop_scale: The least and the largest part of the image's area that a crop has.
        flip: The odds of a mirror image.
        rand_augment_magnitude: From 0 (no RandAugment) to 10, with normal noise of deviation 0.5.
        rand_augment_num_ops: Operations that are drawn for an image.
        color_jitter: Brightness, contrast and saturation change by a factor of up to 1 ± this.
        random_erasing: The odds that a rectangle becomes noise.

    Raises:
        ValueError: A number is out of its range, or the processor's output has no fixed size.
    """

    def __init__(
        self,
        processor,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        flip: float = 0.5,
        rand_augment_magnitude: float = 9,
        rand_augment_num_ops: int = 2,
        color_jitter: float = 0.0,
        random_erasing: float = 0.25,
    ):
        limits = {
            "flip": (flip, 1),
            "rand_augment_magnitude": (rand_augment_magnitude, MAX_MAGNITUDE),
            "rand_augment_num_ops": (rand_augment_num_ops, math.inf),
            "color_jitter": (color_jitter, 1),
            "random_erasing": (random_erasing, 1),
        }
        for name, (value, most) in limits.items():
            if not 0 <= value <= most:
                raise ValueError(f"`{name}` must be from 0 to {most}, not {value!r}.")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"`crop_scale` must increase, from above 0 to 1 at most, not {crop_scale!r}.")
        size = processor.crop_size if processor.do_center_crop else processor.size
        if not (size["height"] and size["width"]):
            raise ValueError(f"The processor must have a height and a width for its output, not {size!r}.")
        self.size, self.resample = (size["height"], size["width"]), processor.resample
        self.mean, self.std = (torch.tensor(values).float() for values in (processor.image_mean, processor.image_std))
        self.fill = tuple(round(255 * value) for value in processor.image_mean)
        self.crop_scale, self.flip = crop_scale, flip
        self.magnitude, self.num_ops = rand_augment_magnitude, rand_augment_num_ops
        self.color_jitter, self.random_erasing = color_jitter, random_erasing

    def __call__(self, image: Image.Image, seed: tuple[int, ...]) -> torch.Tensor:
        """The view (C, H, W) of an image of any size and mode.

        Args:
            seed: Numbers from 0, as many for every image of a run, such as (seed of the run, epoch, index).
        """
        draw, (height, width) = np.random.default_rng(seed), self.size
        image = image.crop(draw_rectangle(draw, *image.size, self.crop_scale, CROP_ASPECT))
        image = with_channels(image, len(self.mean)).resize((width, height), self.resample)
        if draw.random() < self.flip:
            image = ImageOps.mirror(image)
        if self.magnitude:
            for operation in draw.choice(list(OPERATIONS), self.num_ops):
                if draw.random() < 0.5:
                    level = np.clip(draw.normal(self.magnitude, MAGNITUDE_STD), 0, MAX_MAGNITUDE) / MAX_MAGNITUDE
                    level, resample = level * draw.choice([-1, 1]), draw.choice(RESAMPLING)
                    image = OPERATIONS[operation](image, level, resample=resample, fillcolor=self.fill)
        if self.color_jitter:
            for enhancer in draw.permutation([ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]):
                image = enhancer(image).enhance(draw.uniform(1 - self.color_jitter, 1 + self.color_jitter))
        pixels = torch.from_numpy(np.array(image)).view(height, width, -1).permute(2, 0, 1).contiguous() / 255
        pixels = (pixels - self.mean[:, None, None]) / self.std[:, None, None]
        if draw.random() < self.random_erasing:
            left, top, right, bottom = draw_rectangle(draw, width, height, ERASED_AREA, ERASED_ASPECT)
            erased = pixels[:, top:bottom, left:right]
            erased.copy_(torch.from_numpy(draw.standard_normal(erased.shape, dtype=np.float32)))
        return pixels


class TrainingImages(torch.utils.data.Dataset):
    """Items {"pixel_values", "labels"} of a `datasets.Dataset` with the columns `image` and `label`, each a new view in
    each epoch and the same one from any number of workers, also from those that persist.

    The loaders of Accelerate and the Trainer call `set_epoch`, but not with a `SeedableRandomSampler` (the Trainer's
    default) in several processes or after batches were skipped: there, call it before each epoch, in the Trainer from
    a callback's `on_epoch_begin`.
    """

    def __init__(self, dataset, augmentation: TrainingAugmentation, seed: int = 0):
        self.dataset, self.augmentation, self.seed = dataset, augmentation, seed
        self._epoch = torch.tensor(0).share_memory_()  # for workers that persist

    def set_epoch(self, epoch: int):
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        item = self.dataset[index]
        seed = (self.seed, self._epoch.item(), index % len(self))
        return {"pixel_values": self.augmentation(item["image"], seed), "labels": item["label"]}


class StreamedTrainingImages(torch.utils.data.IterableDataset):
    """The same items of a `datasets.IterableDataset`, which shares its files out among the loader's workers. A view
    depends on the epoch, the process, the worker and the place in its part.

    For several processes, split the dataset by `split_dataset_by_node`, and leave the loader out of Accelerate's
    `prepare`, which would split each part once more.
    """

    def __init__(self, dataset, augmentation: TrainingAugmentation, seed: int = 0):
        self.dataset, self.augmentation, self.seed = dataset, augmentation, seed

    def set_epoch(self, epoch: int):
        self.dataset.set_epoch(epoch)

    def __iter__(self):
        rank = self.dataset._distributed.rank if self.dataset._distributed else 0
        worker = get_worker_info()
        part = (self.seed, self.dataset.epoch, rank, worker.id if worker else 0)
        for index, item in enumerate(self.dataset):
            yield {"pixel_values": self.augmentation(item["image"], (*part, index)), "labels": item["label"]}


def draw_rectangle(
    draw: np.random.Generator, width: int, height: int, area: tuple[float, float], aspect: float
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a rectangle with a part of an area, at most `aspect` times as wide as high and the
    reverse; where ten draws don't fit, the largest one."""
    for _ in range(10):
        target = draw.uniform(*area) * width * height
        ratio = math.exp(draw.uniform(-math.log(aspect), math.log(aspect)))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w, h = min(width, round(height * aspect)), min(height, round(width * aspect))
    left, top = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
    return left, top, left + w, top + h
