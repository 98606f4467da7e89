"""Names for the outputs of imported weights: from a file, or the data set that the count tells."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torchvision
from torch import Tensor

from mbv3dist.data.class_names import read_class_file
from mbv3dist.inference.libraries import Source
from mbv3dist.models.anchors import AnchorConfig

_IMAGENET_CLASSES = 1000
_COCO_OUTPUTS = 91


def count_outputs(weight: Tensor, source: Source) -> int:
    """How many outputs a model has, a detector's background included.

    Args:
        weight: The entry `source.outputs_entry`.
        source: The model.

    Raises:
        ValueError: The count is none that such a model can have.
    """
    if not source.is_detector:
        return len(weight)
    per_cell = AnchorConfig().num_per_cell
    if len(weight) % per_cell or len(weight) < 2 * per_cell:
        raise ValueError(
            f"{source.outputs_entry} has {len(weight)} rows, which are no two or more outputs for "
            f"each of the {per_cell} anchors of {source.arch}"
        )
    return len(weight) // per_cell


def find_classes(
    path: str | Path | None, num_outputs: int, *, is_detector: bool, checkpoint: Path
) -> tuple[list[str], str]:
    """Names of the classes, without background, in the order of the outputs.

    Args:
        path: File with one name per line; None: names of ImageNet for a classifier of 1000 outputs,
            of COCO for a detector of 91.
        num_outputs: A detector's background included.
        is_detector: Whether the first output is the background.
        checkpoint: For messages.

    Returns:
        The names, and where they come from.

    Raises:
        ValueError: No file was given and the count tells nothing, or there are too few or many.
    """
    wanted = num_outputs - is_detector
    if path is not None:
        names = read_class_file(path)
        if len(names) != wanted:
            behind = ", and the background before them, which gets no name" if is_detector else ""
            raise ValueError(
                f"--classes {path} has {len(names)} names, the weights in {checkpoint} have "
                f"{wanted} classes{behind}; give one name for each, in the order of the outputs"
            )
        return names, f"named by {Path(path).name}"
    if is_detector and num_outputs == _COCO_OUTPUTS:
        weights = torchvision.models.get_model_weights("ssdlite320_mobilenet_v3_large")
        return _unique(weights.COCO_V1.meta["categories"])[1:], "those of COCO"
    if not is_detector and num_outputs == _IMAGENET_CLASSES:
        weights = torchvision.models.get_model_weights("mobilenet_v3_large")
        return _unique(weights.IMAGENET1K_V1.meta["categories"]), "those of ImageNet"
    raise ValueError(
        f"{checkpoint}: the weights have {wanted} classes, and only ImageNet's 1000 and COCO's 90 "
        "(91 outputs) have names that are known; give --classes FILE with one name per line, in "
        "the order of the outputs" + (", without the background" if is_detector else "")
    )


def _unique(names: Sequence[str]) -> list[str]:
    """Names that stand there several times (COCO's "N/A") get their number in the library's list.

    These outputs are part of the weights and stay, so that all outputs keep their places.
    """
    counts = Counter(names)
    return [f"{name} {number}" if counts[name] > 1 else name for number, name in enumerate(names)]
