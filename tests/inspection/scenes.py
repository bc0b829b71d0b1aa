"""What the tests of inspection look into: a small picture with an edge, and what a module of a network sees of it."""

import numpy as np
import torch
from torch import Tensor, nn

from attnsr.inspection.scene import Box, Scene


def make(height: int = 40, width: int = 48, pixel: tuple[int, int] = (21, 18)) -> Scene:
    """Smooth colours and a slanting edge, cut out of a larger picture at (16, 32); the pixel is in the cut's (x, y)."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).normal(0, 0.02, (height, width, 3))
    waves = [0.4 + 0.2 * np.sin(x / (5 + colour) + y / 7 + colour) for colour in range(3)]
    image = np.stack(waves, 2) + noise + 0.3 * (y > 12 + 0.3 * x)[..., None]
    box = Box(16, 32, width, height)
    whole = (width + 64, height + 64)
    return Scene('picture', image.clip(0, 1).astype(np.float32), (pixel[0] + 16, pixel[1] + 32), box, whole)


def seen(net: nn.Module, scene: Scene, module: nn.Module) -> tuple[tuple, Tensor]:
    """The inputs of a module and its output, when a network is shown a scene."""
    kept = []
    handle = module.register_forward_hook(lambda _, inputs, output: kept.append((inputs, output)))
    with torch.no_grad():
        net(scene.tensor())
    handle.remove()
    return kept[0]


def drawn(figure: object) -> dict[str, list[np.ndarray]]:
    """The arrays of the images in each axes of a figure, by the title of the axes."""
    return {
        axes.get_label(): [np.ma.filled(image.get_array(), np.nan) for image in axes.images] for axes in figure.axes
    }
