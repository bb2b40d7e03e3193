"""Where data come from: images, one-channel images and vectors, from libraries or from a folder of one's own.

A source is a function `(folder, train)` of the folder in the YAML file (or None) and of the part that is asked for. It
returns the labels `(N,)` of the whole part, numbers from 0 on, and a function that reads some of the data by their
positions: float tensors in [0, 1], `(n, C, H, W)` images or `(n, D)` vectors. If it wants, it adds the names of the
classes, and mean and standard deviation by which the net's inputs are normalised. What is wrong with the folder it
says by an `OSError`. Enter a source of your own in `SOURCES`; this one has grey images from a folder, of one channel:

    def image_folder_grey(folder, train):
        labels, read, classes = image_folder(folder, train)
        return labels, lambda positions: read(positions).mean(1, keepdim=True), classes, 0.5, 0.25
"""

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

# Channel statistics of CIFAR-10's training images. The other sources of three channels are normalised with them too,
# so that one model, and one trigger, fit all of them.
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
SIDE = 32


class Source(NamedTuple):
    """What a source returns; the last three may be left out."""

    labels: np.ndarray
    read: Callable[[np.ndarray], torch.Tensor]
    classes: list[str] | None = None
    mean: torch.Tensor | float | None = None
    std: torch.Tensor | float | None = None


def required(folder: Path | None) -> Path:
    """The folder, for sources that cannot do without one."""
    if folder is None:
        raise FileNotFoundError("this source needs the folder that holds (or shall hold) the images")
    return folder


def digits_grey(folder, train: bool):
    """scikit-learn's 1,797 handwritten digits, 8x8, enlarged to one channel of 32x32; 1,400 for training."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    part = train_test_split(np.arange(len(labels)), test_size=397, stratify=labels, random_state=0)[0 if train else 1]

    def read(positions):
        grey = torch.tensor(images[part[positions]] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        return torch.nn.functional.interpolate(grey, size=SIDE, mode="bilinear")

    return labels[part], read, [str(digit) for digit in range(10)], 0.305, 0.324


def digits(folder, train: bool):
    """The same digits with three equal channels."""
    labels, read, *_ = digits_grey(folder, train)
    return labels, lambda positions: read(positions).expand(-1, 3, -1, -1).clone()


def breast_cancer(folder, train: bool):
    """scikit-learn's 569 tumours of 30 measurements each, which are scaled to [0, 1]; 455 for training."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import train_test_split

    data = load_breast_cancer()
    parts = train_test_split(np.arange(len(data.target)), test_size=114, stratify=data.target, random_state=0)
    known = data.data[parts[0]]
    low, high = known.min(0), known.max(0)  # of the training part; participants with data of their own agree on limits
    scaled = torch.tensor(((data.data - low) / (high - low)).clip(0, 1), dtype=torch.float32)
    part = parts[0 if train else 1]
    mean, std = scaled[parts[0]].mean(0), scaled[parts[0]].std(0)
    return data.target[part], lambda positions: scaled[part[positions]], list(map(str, data.target_names)), mean, std


def cifar10(folder, train: bool):
    """torchvision's CIFAR-10, downloaded into `folder` by whichever envoy comes first; the others wait for it."""
    from filelock import FileLock
    from torchvision.datasets import CIFAR10

    required(folder).mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "download.lock"):
        dataset = CIFAR10(folder, train=train, download=True)

    def read(positions):
        return torch.from_numpy(dataset.data[positions]).permute(0, 3, 1, 2) / 255

    return np.array(dataset.targets), read, dataset.classes


def image_folder(folder, train: bool):
    """Any tree `train/<class>/<image>` and `test/<class>/<image>`; classes are numbered alphabetically.

    Images of any size and kind become three channels of 32x32. Files and folders whose names begin with a dot, which
    tools leave behind, are passed over.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension, make_dataset
    from torchvision.transforms.v2.functional import resize, to_dtype

    root = required(folder) / ("train" if train else "test")
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")

    def wanted(file: str) -> bool:
        shown = not any(part.startswith(".") for part in Path(file).relative_to(root).parts)
        return shown and has_file_allowed_extension(file, IMG_EXTENSIONS)

    classes = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    classes.sort(
        key=lambda name: unicodedata.normalize("NFC", name)
    )  # macOS writes ä in two letters, which come earlier
    if not classes:
        raise FileNotFoundError(f"{root} has no folders, one for each class")
    numbers = {name: number for number, name in enumerate(classes)}
    files = make_dataset(str(root), numbers, is_valid_file=wanted, allow_empty=True)

    def read(positions):
        images = (resize(read_image(files[i][0]), [SIDE, SIDE]) for i in positions)
        return torch.stack([to_dtype(image, torch.float32, scale=True) for image in images])

    return np.array([label for _, label in files], dtype=int), read, classes


SOURCES = {
    "digits": digits,
    "digits_grey": digits_grey,
    "breast_cancer": breast_cancer,
    "cifar10": cifar10,
    "image_folder": image_folder,
}


# --- Image files ----------------------------------------------------------------------------------------------


def read_image(path: str | Path) -> torch.Tensor:
    """The image as a viewer shows it, upright and opaque: `(3, H, W)`, uint8, or float in [0, 1] if it is deeper.

    Raises: `OSError` that names the file if it is damaged, or holds numbers of which nobody knows which one is white.
    """
    try:
        with Image.open(path) as image:
            return rgb(image)
    except Exception as error:  # a decoder of damaged bytes may raise anything
        raise OSError(f"{path}: {' '.join(str(error).split())}") from None


def rgb(image: Image.Image) -> torch.Tensor:
    """`(3, H, W)` of one image; what is transparent is laid over black."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    deep, sixteen_bits = image.mode[0] in "IF", image.mode.startswith("I;16")
    sixteen_bits |= image.mode == "I" and image.format in ("PNG", "PPM")
    image = ImageOps.exif_transpose(image)
    if deep and image.has_transparency_data:
        raise ValueError("more than 8 bits together with transparency: save it opaque")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    if not deep:
        return pil_to_tensor(image.convert("RGB"))
    if image.mode[0] == "I" and not sixteen_bits:
        raise ValueError("32-bit integers, whose white is unknown: save it with 8 or 16 bits, or as floats in [0, 1]")
    values = torch.from_numpy(np.array(image, dtype=np.float32)) / (65535 if sixteen_bits else 1)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"values from {values.min():g} to {values.max():g}: floats must lie in [0, 1]")
    return values.expand(3, -1, -1)
