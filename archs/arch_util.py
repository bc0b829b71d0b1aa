"""What the networks share: image range, padding and cropping, and the loading of published checkpoints."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# Mean of DIV2K in RGB, as the published networks subtract it.
RGB_MEAN = (0.4488, 0.4371, 0.4040)

# Where published checkpoints keep the parameters, best first.
WRAPPERS = ('params_ema', 'params', 'model_state_dict', 'state_dict')


class SRNetwork(nn.Module):
    """A super-resolution network whose checkpoints are interchangeable with the published ones.

    Parameters bear their published names. Constants that the published network stores as parameters are not kept:
    ``published_constants`` computes them, and loading drops them.
    """

    #: Regular expressions of the published names that are constants or never used.
    unused_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_drop_unused)

    def published_constants(self) -> dict[str, Tensor]:
        """{published name: value} of all that a published checkpoint holds beyond ``state_dict()``."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``, from a bare state dict or a checkpoint that wraps one.

        Args:
            state_dict: {name: tensor}, or a checkpoint with that under ``params_ema``, ``params``,
                ``model_state_dict`` or ``state_dict``; names may begin with ``module.``.
            strict: Whether names must match exactly (published constants aside).
            assign: See ``nn.Module.load_state_dict``.

        Raises:
            RuntimeError: names or shapes do not match.
            ValueError: there are no parameters in ``state_dict``.
        """
        return super().load_state_dict(unwrap_state_dict(state_dict), strict, assign)

    @classmethod
    def is_unused(cls, name: str) -> bool:
        """Whether a published name is a constant or a parameter that is never used."""
        return any(re.fullmatch(pattern, name) for pattern in cls.unused_names)


def _drop_unused(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, SRNetwork)
    for name in [name for name in state_dict if name.startswith(prefix)]:
        if module.is_unused(name[len(prefix) :]):
            del state_dict[name]


def wrapper_of(checkpoint: Mapping[str, Any], preferred: str | None = None) -> str | None:
    """The key of ``checkpoint`` that holds its parameters, or None if they are not wrapped."""
    keys = (preferred, *WRAPPERS)
    return next((key for key in keys if key is not None and isinstance(checkpoint.get(key), Mapping)), None)


def unwrap_state_dict(checkpoint: Mapping[str, Any], preferred: str | None = None) -> dict[str, Tensor]:
    """The bare {name: tensor} in a checkpoint, without wrappers and without ``module.`` before the names.

    Args:
        checkpoint: What a checkpoint file holds.
        preferred: The wrapper to take where there are several, for example ``'params'``.

    Raises:
        ValueError: there are no parameters in it, or they are under a name that is not known.
    """
    wrapper = wrapper_of(checkpoint, preferred)
    parameters = checkpoint if wrapper is None else checkpoint[wrapper]
    state_dict = {str(name).removeprefix('module.'): value for name, value in parameters.items()}
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(
            'this checkpoint holds no parameters: expected {name: tensor}, bare or under one of '
            f'{", ".join(WRAPPERS)}; found the keys {", ".join(map(repr, list(checkpoint)[:8])) or "(none)"}'
        )
    return state_dict


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad right and bottom by reflection to the next multiple of ``multiple``.

    The reflection goes on where the padding is larger than the image: index pattern of period 2(N - 1), a side of
    one pixel repeats it.

    Args:
        x: (B, C, H, W), H and W at least 1.

    Returns:
        (B, C, H', W').
    """
    for dim in (2, 3):
        side = x.shape[dim]
        period = max(2 * (side - 1), 1)
        index = torch.arange(-(-side // multiple) * multiple, device=x.device) % period
        x = x.index_select(dim, torch.minimum(index, period - index))
    return x
