"""Random views of images for training, as in the original recipe (timm's `rand-m9-mstd0.5-inc1`), and mixed batches.

A view is a function of the image and a seed. It depends neither on the process that makes it nor on the images before
it, and a resumed run sees it again, because no global generator is read or moved.

Letters in shapes: B images, C channels, H height, W width.
"""

import math

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch.utils.data import get_worker_info

from ..data import read_image
from ..model.images_hydravit import with_channels

MAX_MAGNITUDE, MAGNITUDE_STD = 10, 0.5
RESAMPLING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
CROP_ASPECT = 4 / 3
ERASED_ASPECT, ERASED_AREA = 1 / 0.3, (0.02, 1 / 3)


def transform(image: Image.Image, *matrix: float, **how) -> Image.Image:
    """Move pixels: the one at (x, y) comes from (ax + by + c, dx + ey + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **how)


# RandAugment's operations on an RGB or gray image. The level goes from 0 to ± 1, the strongest; its sign is the
# direction, if an operation has one. `how` says how pixels move: `resample`, and `fillcolor` for those from outside.
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
    """Makes a random view of an image, as `pixel_values`: a crop, a flip, RandAugment and an erased rectangle.

    RandAugment is timm's. It draws Pillow's operations with replacement and skips each with odds of one half. A larger
    magnitude always makes the change stronger: 9 of 10 turns an image by 27 degrees. Four details differ from timm.
    Crops are resized as the processor does it. The crop of a long image may lie off its middle. An erased rectangle may
    touch both sides. Posterizing keeps one bit at least, as Pillow demands. There is no colour jitter: timm leaves it
    out beside RandAugment, so the 0.3 in the original's settings had no effect.

    Args:
        processor: The model's image processor, for RGB or gray images. It gives the output size, the resampling, the
            mean and the standard deviation.
        crop_scale: Smallest and largest share of the image's area in a crop.
        flip: Odds of a mirror image.
        rand_augment_magnitude: Strength from 0 (no RandAugment) to 10, with normal noise of deviation 0.5.
        rand_augment_num_ops: Number of operations that are drawn for an image.
        random_erasing: Odds that a rectangle becomes noise.

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
        random_erasing: float = 0.25,
    ):
        limits = {
            "flip": (flip, 1),
            "rand_augment_magnitude": (rand_augment_magnitude, MAX_MAGNITUDE),
            "rand_augment_num_ops": (rand_augment_num_ops, math.inf),
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
        self.random_erasing = random_erasing

    def __call__(self, image, seed: tuple[int, ...]) -> torch.Tensor:
        """Make the view, (C, H, W), of an image of any size and mode.

        Args:
            image: The image, decoded or as an undecoded data set has it.
            seed: Numbers that are not negative, such as (seed of the run, epoch, index). All images of a run have as
                many.
        """
        draw, (height, width) = np.random.default_rng(seed), self.size
        image = read_image(image)
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
    """Draw the left, top, right and bottom of a rectangle in an area. After ten draws that don't fit, take the largest.

    Args:
        draw: The generator.
        width, height: Sides of the area.
        area: Smallest and largest share of the area that the rectangle has.
        aspect: Largest ratio of its longer to its shorter side.
    """
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


def mix_images(
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    num_labels: int,
    seed: list[int],
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each image with another one of the batch.

    Each image draws its own partner, method and share. The methods are mixup (https://arxiv.org/abs/1710.09412) and
    CutMix (https://arxiv.org/abs/1905.04899).

    Args:
        pixel_values: Images, (B, C, H, W).
        labels: Labels, (B,), or floats for each image, (B, labels) or (B,), such as those of several labels.
        num_labels: Number of classes.
        seed: Seed of the draws.
        mixup_alpha, cutmix_alpha: Parameter of the Beta distribution that the shares are drawn from. 0 turns a method
            off. If both are on, each gets half of the images.

    Returns:
        The mixed images, (B, C, H, W), and their mixed labels, (B, labels).

    Raises:
        ValueError: Both alphas are 0.
    """
    if not (mixup_alpha or cutmix_alpha):
        raise ValueError("`mixup_alpha` or `cutmix_alpha` must be above 0.")
    generator = np.random.default_rng(seed)
    (batch, _, height, width), device = pixel_values.shape, pixel_values.device
    is_cut = generator.random(batch) < (cutmix_alpha > 0) / ((cutmix_alpha > 0) + (mixup_alpha > 0))
    alpha = np.where(is_cut, cutmix_alpha, mixup_alpha)
    share = generator.beta(alpha, alpha)
    partner = torch.from_numpy(generator.permutation(batch)).to(device)
    # The share of each pixel that is the image's own: `share` everywhere, or 1 outside of the partner's box
    inside = np.ones((batch, 1, 1), dtype=bool)
    for side, shape in ((height, (1, -1, 1)), (width, (1, 1, -1))):
        centre, half = generator.random((batch, 1, 1)) * side, np.sqrt(1 - share)[:, None, None] * side / 2
        pixels = np.arange(side).reshape(shape) + 0.5
        inside = inside & (abs(pixels - centre) < half)
    own = np.where(is_cut[:, None, None], ~inside, share[:, None, None])
    own = torch.from_numpy(own.astype(np.float32)).to(device)[:, None]
    pixel_values = torch.lerp(pixel_values[partner], pixel_values, own.to(pixel_values.dtype))
    if not labels.is_floating_point():
        labels = nn.functional.one_hot(labels, num_labels).float()
    targets = labels.reshape(batch, -1)
    return pixel_values, torch.lerp(targets[partner], targets, own.mean((1, 2, 3))[:, None])
