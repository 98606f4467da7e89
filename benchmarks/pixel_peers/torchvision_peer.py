"""torchvision: ImageFolder and a VOC data set with its transforms, PIL images or uint8 tensors."""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-return, type-arg, misc"
# (of packages that only the peers' environment has)

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = (124, 116, 104)  # what zoom-out puts around the picture


def versions() -> dict[str, str]:
    """Return what ran."""
    import PIL

    return {
        "torchvision": torchvision.__version__,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
    }


def prepare(folder: Path, out: Path) -> None:
    """Read the folder as it is."""
    del folder, out


def v1_transform(size: int) -> Any:
    """Return the v1 training transform of torchvision's and PyTorch's ImageNet examples."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def uint8_transform(size: int) -> Any:
    """Return the same view for uint8 tensors; normalisation is left to the device."""
    return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])


def load_tensor(path: str | Path) -> torch.Tensor:
    """Decode a file to uint8 [3, H, W]."""
    return decode_image(str(path), mode=ImageReadMode.RGB)


def open_loader(name: str, job: dict[str, Any]) -> Callable[[], Iterator[tuple[Any, Any]]]:
    """Return what starts an epoch."""
    torch.set_num_threads(1)
    folder = job["folder"]
    collate: Any = None
    dataset: Any
    if name == "torchvision_pil":
        dataset = ImageFolder(folder, v1_transform(job["size"]))
    elif name == "torchvision_v2":
        dataset = ImageFolder(folder, uint8_transform(job["size"]), loader=load_tensor)
    else:
        dataset = Voc(Path(folder), job["size"], tensors=name == "detection_v2")
        collate = collate_boxes
    loader: Any = DataLoader(
        dataset,
        batch_size=job["batch"],
        shuffle=True,
        num_workers=job["workers"],
        collate_fn=collate,
    )
    if collate is None:
        return lambda: iter(loader)
    return lambda: ((images, numbers) for images, _targets, numbers in loader)


class Voc(Dataset):
    """A VOC folder with SSD's augmentation: zoom-out, IoU crop, flip, resize.

    Transforms, their order and probabilities are those of torchvision's detection reference
    (ssd without the colours), with the resize, which there is the model's, on the picture.
    """

    def __init__(self, root: Path, size: int, *, tensors: bool):
        names = (root / "ImageSets" / "Main" / "trainval.txt").read_text().split()
        self.tensors = tensors
        # Parsed once and kept: this is not what is measured.
        self.samples = [
            (root / "JPEGImages" / f"{name}.jpg", *read_boxes(root / "Annotations" / f"{name}.xml"))
            for name in names
        ]
        classes = sorted({label for _path, _boxes, labels in self.samples for label in labels})
        self.numbers = {name: number for number, name in enumerate(classes)}
        fill: Any = {tv_tensors.Image: FILL, Image.Image: FILL, "others": 0}
        steps: list[Any] = [
            v2.RandomZoomOut(fill=fill),
            v2.RandomIoUCrop(),
            v2.RandomHorizontalFlip(p=0.5),
            v2.Resize((size, size), antialias=True),
        ]
        if not tensors:  # as in the reference's "pil" backend
            steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        self.transform = v2.Compose([*steps, v2.SanitizeBoundingBoxes(), v2.ToPureTensor()])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        path, boxes, labels = self.samples[index]
        image: Any
        if self.tensors:
            image = tv_tensors.Image(load_tensor(path))
            height, width = image.shape[-2:]
        else:
            image = Image.open(path).convert("RGB")
            width, height = image.size
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                format="XYXY",
                canvas_size=(height, width),
            ),
            "labels": torch.tensor([self.numbers[label] for label in labels]),
        }
        image, target = self.transform(image, target)
        return image, target, index


def read_boxes(path: Path) -> tuple[list[list[float]], list[str]]:
    """Return the boxes (xyxy from 0, half-open) and class names of an annotation."""
    boxes, labels = [], []
    for item in ElementTree.parse(path).iterfind("object"):
        x0, y0, x1, y1 = (
            float(item.findtext(f"bndbox/{name}", "")) for name in ("xmin", "ymin", "xmax", "ymax")
        )
        boxes.append([x0 - 1, y0 - 1, x1, y1])
        labels.append(item.findtext("name", ""))
    return boxes, labels


def collate_boxes(samples: list[tuple[Any, Any, int]]) -> tuple[Any, Any, Any]:
    """Stack the pictures; targets stay a list, as torchvision's detectors take them."""
    images, targets, indices = zip(*samples, strict=True)
    return torch.stack(images), list(targets), torch.tensor(indices)
