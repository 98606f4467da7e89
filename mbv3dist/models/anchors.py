"""Anchors (default boxes) of an SSD detector: "SSD: Single Shot MultiBox Detector", 2016, page 6.

Every cell of map k gets a square of scale s_k, a square of the geometric mean of s_k and s_(k+1),
and two rectangles for each aspect ratio. With the defaults and 320 px this is torchvision's
`DefaultBoxGenerator` of SSDLite, bit for bit: 3234 anchors.

Shapes: anchors [A, 4], cxcywh as fractions of the canvas; ordered by map, row, column, shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mbv3dist.config import ModelConfig


@dataclass(frozen=True)
class AnchorConfig:
    """Shapes and places of the anchors.

    Attributes:
        scales: one per map and a last one, as fractions of the canvas side, ascending.
        ratios: aspect ratios besides 1, the same on all maps; each is used upright and lying.
        steps: pixels between neighbouring centres of each map; empty: the canvas is divided evenly.
        clip: whether centres, widths and heights are clipped to [0, 1].
    """

    scales: tuple[float, ...] = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0)
    ratios: tuple[float, ...] = (2.0, 3.0)
    steps: tuple[float, ...] = ()
    clip: bool = True

    def __post_init__(self) -> None:
        """Refuse values that give no sensible anchors, with ValueError."""
        if len(self.scales) < 2 or min(self.scales) <= 0:
            raise ValueError(
                f"anchors.scales: {self.scales} is no list of scales; give one positive number per "
                "map and a last one"
            )
        if any(ratio <= 0 for ratio in self.ratios):
            raise ValueError(f"anchors.ratios: {self.ratios} must be positive, for example 2, 3")
        if self.steps and (len(self.steps) != self.num_maps or min(self.steps) <= 0):
            raise ValueError(
                f"anchors.steps: {self.steps} must be {self.num_maps} positive numbers "
                "(one per map), or empty"
            )

    @property
    def num_maps(self) -> int:
        """Feature maps that the scales are for."""
        return len(self.scales) - 1

    @property
    def num_per_cell(self) -> int:
        """Anchors in each cell of each map."""
        return 2 + 2 * len(self.ratios)


def scales_between(minimum: float, maximum: float, *, num_maps: int = 6) -> tuple[float, ...]:
    """Evenly spaced scales for `num_maps` maps, and 1 as the last: torchvision's rule.

    Args:
        minimum: scale of the first map, as a fraction of the canvas side.
        maximum: scale of the last map.
        num_maps: number of feature maps, at least 2.

    Returns:
        num_maps + 1 scales for `AnchorConfig`.
    """
    if not 0 < minimum < maximum or num_maps < 2:
        raise ValueError(
            f"anchors: scales from {minimum} to {maximum} over {num_maps} maps; need "
            "0 < minimum < maximum and at least 2 maps"
        )
    step = maximum - minimum
    return (*(minimum + step * k / (num_maps - 1.0) for k in range(num_maps)), 1.0)


def recipe_anchors(recipe: ModelConfig) -> AnchorConfig:
    """Return the anchors that a recipe's `model` section asks for.

    Raises:
        ValueError: if its numbers give no sensible anchors.
    """
    return AnchorConfig(
        scales=recipe.anchor_scales, ratios=recipe.anchor_ratios, steps=recipe.anchor_steps
    )


def make_anchors(
    config: AnchorConfig,
    feature_sizes: Sequence[tuple[int, int]],
    *,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Lay anchors over feature maps.

    Args:
        config: shapes of the anchors.
        feature_sizes: (height, width) of each map in cells.
        size: canvas (height, width) in pixels; needed only with `config.steps`.

    Returns:
        float32 [A, 4], cxcywh as fractions of the canvas.

    Raises:
        ValueError: if the number of maps is not that of the configuration.
    """
    if len(feature_sizes) != config.num_maps:
        raise ValueError(
            f"anchors.scales: {len(config.scales)} scales are for {config.num_maps} maps, the "
            f"model has {len(feature_sizes)}; give {len(feature_sizes) + 1} scales"
        )
    anchors = []
    for k, (rows, columns) in enumerate(feature_sizes):
        centre_y, centre_x = cell_centres(config, k, (rows, columns), size=size)
        shapes = torch.tensor(cell_shapes(config, k), dtype=torch.float32)  # [S, 2]
        grid = (rows, columns, len(shapes))
        anchors.append(
            torch.stack(
                (
                    centre_x[None, :, None].expand(grid),
                    centre_y[:, None, None].expand(grid),
                    shapes[:, 0].expand(grid),
                    shapes[:, 1].expand(grid),
                ),
                dim=-1,
            ).reshape(-1, 4)
        )
    result = torch.cat(anchors)
    return result.clamp(0, 1) if config.clip else result


def cell_centres(
    config: AnchorConfig, k: int, cells: tuple[int, int], *, size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Return where the cells of map k have their centres, not clipped.

    Args:
        config: steps between them.
        k: number of the map.
        cells: (rows, columns) of the map.
        size: canvas (height, width) in pixels; needed only with `config.steps`.

    Returns:
        y, float32 [rows], and x, float32 [columns], as fractions of the canvas.
    """
    assert size is not None or not config.steps, "steps are in pixels and need the canvas size"
    rows, columns = cells
    if config.steps and size is not None:
        divide_y, divide_x = size[0] / config.steps[k], size[1] / config.steps[k]
    else:
        divide_y, divide_x = float(rows), float(columns)
    return (torch.arange(rows) + 0.5) / divide_y, (torch.arange(columns) + 0.5) / divide_x


def cell_shapes(config: AnchorConfig, k: int) -> list[tuple[float, float]]:
    """Return (width, height) of the anchors of a cell of map k, as fractions, not clipped."""
    scale = config.scales[k]
    between = math.sqrt(scale * config.scales[k + 1])
    shapes = [(scale, scale), (between, between)]
    for ratio in config.ratios:
        root = math.sqrt(ratio)
        shapes += [(scale * root, scale / root), (scale / root, scale * root)]
    return shapes
