"""What the networks share: image range, padding and cropping, modules, and the loading of published checkpoints."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnsr.archs.state_dicts import compare, explain, unwrap_state_dict
from attnsr.ops.channel_attention import channel_attention
from attnsr.ops.gated_feed_forward import gated_feed_forward
from attnsr.ops.separable_conv import separable_conv
from attnsr.ops.separable_conv.reference import layer_norm

# Mean of DIV2K in RGB, as the published networks subtract it.
RGB_MEAN = (0.4488, 0.4371, 0.4040)

# All whose statistics move in training.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)

_Network = TypeVar('_Network', bound='SRNetwork')
_Module = TypeVar('_Module', bound='Folding')


@cache
def keep_freed_memory() -> None:
    """Have glibc keep up to 64 MiB of freed memory in this process, rather than fetch it anew in every layer.

    It gives memory back that is more than twice the largest block freed so far (it looks at blocks below 32 MiB only).
    So such a block is freed here; nobody has written to it, and it took no memory.
    """
    bytes(2**25 - 2**16)


class SRNetwork(nn.Module):
    """A super-resolution network of RGB images whose checkpoints are interchangeable with the published ones.

    ``forward`` takes (B, 3, H, W), RGB in [0, 1], any H, W >= 1, and returns (B, 3, upscale * H, upscale * W) in the
    same range (not clipped); what happens between padding and cropping is ``reconstruct``, which a network defines.
    Of a network in half precision the image may be float32, and is then centred in float32: 8-bit images have values
    that bfloat16 lacks.

    Parameters bear their published names. Constants that the published network stores as parameters are not kept:
    ``published_constants`` computes them, and loading drops them.

    Args:
        upscale: Scale factor, at least 1.
        mean: Of the three channels, taken from the image before the network and added afterwards, or None.
        img_range: Factor on the image within the network.
        multiple: The image is padded right and bottom until its sides are multiples of this.
        padding: What with: ``'reflect'`` or ``'zeros'``.
        use_checkpoint: Gradient checkpointing: in training, keep only what goes from block to block, and compute
            each block again for its gradients. The gradients are the same, memory is less, and time more.
    """

    #: Regular expressions of the published names that are constants or never used.
    unused_names: ClassVar[tuple[str, ...]] = ()
    #: How the names of the parameters begin that serve one scale only.
    upsampler: ClassVar[str]
    #: Arguments of the constructor that the result depends on, and that a state dict does not tell (or not always).
    untold: ClassVar[tuple[str, ...]] = ()
    #: Bytes that inference in float32 on a CPU takes for each LR pixel and channel, measured on the published networks
    #: and rounded up; less on large images.
    bytes_per_channel: ClassVar[float]

    mean: Tensor | None

    def __new__(cls: type[_Network], *args: Any, **arguments: Any) -> _Network:
        net = super().__new__(cls)
        # Here, before a network's own constructor. Copies and pickles are made with none, and get these as their state.
        net.__dict__['_arguments'] = arguments
        return net

    def __init__(
        self,
        upscale: int,
        *,
        mean: Sequence[float] | None = RGB_MEAN,
        img_range: float = 1.0,
        multiple: int = 1,
        padding: Literal['reflect', 'zeros'] = 'reflect',
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if upscale < 1:
            raise ValueError(f'upscale must be at least 1, got {upscale}')
        self.upscale, self.img_range, self.multiple, self.padding = upscale, img_range, multiple, padding
        self.use_checkpoint = use_checkpoint
        # In double precision, so that a network turned to float64 has the mean exactly.
        values = None if mean is None else torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1)
        self.register_buffer('mean', values, persistent=False)
        self.register_load_state_dict_pre_hook(_drop_unused)

    @property
    def arguments(self) -> dict[str, Any]:
        """All that the constructor was called with, its defaults included: ``type(net)(**net.arguments)``."""
        parameters = inspect.signature(type(self)).parameters.values()
        defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        return {**defaults, **self.__dict__['_arguments']}

    def fold_for_inference(self: _Network) -> _Network:
        """Combine once what eval mode otherwise combines in every forward: BatchNorm into convolutions, and products.

        In float64, and kept in the dtype of the parameters: fold before converting to half precision. The parameters
        and ``state_dict()`` stay as they are. What is kept moves and converts with the network, is dropped by
        ``train()`` and ``load_state_dict()``, and is not used where autograd wants the parameters' gradients, nor
        where they have changed since: by assignment or a step of training, but not by writing into
        ``parameter.data``, nor in a graph that was compiled before.

        Returns:
            The network itself.
        """
        for module in self.modules():
            if isinstance(module, Folding):
                module.fold()
        return self

    def reconstruct(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 3, upscale * H, upscale * W), both without mean; H, W multiples of ``multiple``."""
        raise NotImplementedError

    def super_resolve(self, x: Tensor) -> Tensor:
        """What ``forward`` is. Each network defines its own, as torch.compile counts recompilations by function."""
        if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point() or not all(x.shape):
            raise ValueError(
                f'{type(self).__name__} takes RGB images as a floating-point tensor (B, 3, H, W) with H, W >= 1; '
                f'got {tuple(x.shape)}, {x.dtype}'
            )
        dtype, (height, width) = x.dtype, x.shape[2:]
        computed = next(self.parameters()).dtype
        if self.multiple > 1:
            pad = pad_by_reflection if self.padding == 'reflect' else pad_by_zeros
            x = pad(x, self.multiple)
        if self.mean is None:
            mean = None
        else:
            mean = self.mean.to(x.dtype)
            x = (x - mean) * self.img_range
        if not torch.compiler.is_compiling():
            keep_freed_memory()
        x = self.reconstruct(x.to(computed).contiguous(memory_format=torch.channels_last))
        x = x.to(dtype)  # autocast leaves it in half precision
        if mean is not None:
            x = x / self.img_range + mean
        return x if self.multiple == 1 else crop(x, self.upscale * height, self.upscale * width)

    def run(self, block: nn.Module, *args: Any) -> Any:
        """``block(*args)``, in training with gradient checkpointing if the network was built for it."""
        if not (self.use_checkpoint and self.training and torch.is_grad_enabled()):
            return block(*args)
        options: dict[str, Any] = {}
        # A compiler takes the statistics' move out of the block, and takes no context.
        if not torch.compiler.is_compiling() and any(isinstance(module, BATCH_NORMS) for module in block.modules()):
            options['context_fn'] = partial(_computing_twice, block)
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **options)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``, from a bare state dict or a checkpoint that wraps one.

        Args:
            state_dict: {name: tensor}, or a checkpoint with that under ``params_ema``, ``params``,
                ``model_state_dict`` or ``state_dict``; names may begin with ``module.``.
            strict: Whether names must match exactly (published constants aside).
            assign: See ``nn.Module.load_state_dict``.

        Raises:
            RuntimeError: names or shapes do not match; the message names them, and the network that they are of if
                that is another one of this package.
            ValueError: there are no parameters in ``state_dict``.
        """
        given = self.without_unused(unwrap_state_dict(state_dict))
        if strict and (mismatch := compare(self, given)):
            raise RuntimeError(explain(self, given, mismatch))
        return super().load_state_dict(given, strict, assign)

    def mean_shift_constants(self) -> dict[str, Tensor]:
        """The mean as the 1x1 convolutions ``sub_mean`` and ``add_mean`` that published networks store."""
        assert self.mean is not None
        dtype = next(self.parameters()).dtype
        eye = torch.eye(3, dtype=dtype).view(3, 3, 1, 1)
        mean = self.img_range * self.mean.flatten().to('cpu', dtype)
        return {
            'sub_mean.weight': eye.clone(),
            'sub_mean.bias': -mean,
            'add_mean.weight': eye.clone(),
            'add_mean.bias': mean,
        }

    @classmethod
    def arguments_of(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """The constructor's arguments as a bare state dict tells them; of ``untold`` those that it happens to tell.

        Raises:
            LookupError, ValueError, TypeError, ArithmeticError: it is not of this network.
        """
        raise NotImplementedError

    @classmethod
    def is_unused(cls, name: str) -> bool:
        """Whether a published name is a constant or a parameter that is never used."""
        return any(re.fullmatch(pattern, name) for pattern in cls.unused_names)

    @classmethod
    def without_unused(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A bare state dict without the names that are constants or never used."""
        return {name: tensor for name, tensor in state_dict.items() if not cls.is_unused(name)}

    def published_constants(self) -> dict[str, Tensor]:
        """{published name: value} of all that a published checkpoint holds beyond ``state_dict()``."""
        return {}


class Folding(nn.Module):
    """A module that combines some of its parameters before it uses them in eval mode, in every forward or once.

    A class defines ``sources`` and ``combine``, and uses ``folded()``.
    """

    def __init__(self) -> None:
        super().__init__()
        # How the sources were when they were combined for good, and how many tensors that gave.
        self._folded_from: tuple[Any, ...] | None = None
        self._folds = 0

    def sources(self) -> tuple[Tensor, ...]:
        """The parameters and buffers that are combined, all of this module or of modules in it."""
        raise NotImplementedError

    def combine(self, *sources: Tensor) -> tuple[Tensor, ...]:
        """What is used instead of the sources."""
        raise NotImplementedError

    def folded(self) -> tuple[Tensor, ...]:
        """The sources combined: as :meth:`fold` has kept it, if that still holds."""
        return self._kept() if self._is_folded() else self.combine(*self.sources())

    def fold(self) -> None:
        """Combine the sources in float64, and keep that in their dtype."""
        self._unfold()
        sources = self.sources()
        with torch.inference_mode(False), torch.no_grad():  # what is kept may serve outside of inference mode too
            kept = self.combine(*(source.double() for source in sources))
            for i, tensor in enumerate(kept):
                self.register_buffer(f'_folded_{i}', tensor.to(sources[0].dtype), persistent=False)
        self._folds, self._folded_from = len(kept), _state_of(sources)

    def train(self: _Module, mode: bool = True) -> _Module:
        if mode:
            self._unfold()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._unfold()
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # what moves and converts modules
        current, before = self._is_current(), self.sources()[0].dtype
        super()._apply(fn, recurse)
        if current:
            self._folded_from = _state_of(self.sources())
            if torch.promote_types(before, self.sources()[0].dtype) != before:
                self.fold()  # to more digits than were kept
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_folded_from': () if self._is_current() else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._folded_from is not None:
            self._folded_from = _state_of(self.sources())

    def _is_current(self) -> bool:
        return self._folded_from is not None and self._folded_from == _state_of(self.sources())

    def _is_folded(self) -> bool:
        if self._folded_from is None:
            return False
        if torch.is_grad_enabled() and any(source.requires_grad for source in self.sources()):
            return False
        return torch.compiler.is_compiling() or self._is_current()  # a compiler's tensors have no such state

    def _kept(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f'_folded_{i}') for i in range(self._folds))

    def _unfold(self) -> None:
        for i in range(self._folds):
            delattr(self, f'_folded_{i}')
        self._folds, self._folded_from = 0, None


def _state_of(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What differs once one of these is another tensor, or other numbers were written into it."""
    return tuple((t.data_ptr(), t.dtype, None if t.is_inference() else t._version) for t in tensors)


def _drop_unused(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, SRNetwork)
    for name in [name for name in state_dict if name.startswith(prefix)]:
        if module.is_unused(name[len(prefix) :]):
            del state_dict[name]


def _computing_twice(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a block's first computation and of its second, which must not move BatchNorm's statistics."""
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """The statistics move, but copies of them."""
    norms = [module for module in block.modules() if isinstance(module, BATCH_NORMS)]
    kept = [dict(norm.named_buffers()) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        for name, value in buffers.items():
            setattr(norm, name, value.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, value in buffers.items():
                setattr(norm, name, value)


def pad_by_reflection(x: Tensor, multiple: int) -> Tensor:
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
        # A tensor, since ONNX divides by no size that is known at run time only.
        period = torch.full((), 2 * (side - 1), device=x.device).clamp(min=1)
        index = torch.arange(_round_up(side, multiple), device=x.device) % period
        x = x.index_select(dim, torch.minimum(index, period - index))
    return x


def pad_by_zeros(x: Tensor, multiple: int) -> Tensor:
    """Pad right and bottom with zeros to the next multiple of ``multiple``: (B, C, H, W) to (B, C, H', W')."""
    height, width = x.shape[2:]
    return F.pad(x, (0, _round_up(width, multiple) - width, 0, _round_up(height, multiple) - height))


def _round_up(side: int, multiple: int) -> int:
    return (side + multiple - 1) // multiple * multiple  # not by -(-side // multiple): ONNX truncates


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The upper left ``height x width`` pixels of (B, C, H, W)."""
    if torch.compiler.is_compiling():
        # A slice would ask whether it is contiguous, and an exported program would then refuse either the sizes that
        # need padding or those that do not.
        rows, columns = (torch.arange(side, device=x.device) for side in (height, width))
        return x.index_select(2, rows).index_select(3, columns)
    return x[:, :, :height, :width]


def pixel_shuffle_tail(channels: int, upscale: int) -> nn.Sequential:
    """The upsampler of the light networks: one 3x3 convolution to ``3 * upscale^2`` channels, and their shuffle."""
    return nn.Sequential(nn.Conv2d(channels, 3 * upscale**2, 3, padding=1), nn.PixelShuffle(upscale))


class LayerNorm2d(nn.Module):
    """Layer norm over the channels at each pixel of (B, C, H, W).

    Args:
        channels: C.
        eps: Added to the (biased) variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class GatedFeedForward(nn.Module):
    """Gated feed-forward with depthwise convolutions (DLGSANet's GDFN, ASID's GFN).

    ``forward(x, norm)`` is ``x + feed_forward(norm(x))``, of (B, C, H, W).

    Args:
        channels: C.
        expansion: Hidden channels over C.
    """

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * channels
        self.project_in = nn.Conv2d(channels, 2 * hidden, 1, bias=False)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor, norm: LayerNorm2d) -> Tensor:
        weights = self.project_in.weight, self.dwconv.weight, self.project_out.weight
        return gated_feed_forward(x, norm.weight, norm.bias, norm.eps, *weights)


class ChannelAttention(nn.Module):
    """Attention between channels (DLGSANet's SparseGSA, ASID's channel attention).

    ``forward(x, norm, ...)`` is ``x + attention(norm(x))``, of (B, C, H, W).

    Args:
        channels: C.
        heads: Runs of channels that attend each within itself.
        activation: Of the products: ``'relu'`` or ``'softmax'``.
    """

    def __init__(self, channels: int, heads: int, activation: Literal['relu', 'softmax']) -> None:
        super().__init__()
        self.heads, self.activation = heads, activation
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=False)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor, norm: LayerNorm2d, layout: str = 'image', window_size: int | None = None) -> Tensor:
        """Attend within the tokens that ``layout`` and ``window_size`` say, see ``ops/channel_attention``."""
        qkv = separable_conv(x, norm.weight, norm.bias, norm.eps, self.qkv.weight, self.qkv_dwconv.weight)
        y = channel_attention(
            qkv,
            self.temperature,
            self.activation,
            heads=self.heads,
            layout=layout,
            window_size=window_size,
            weight=self.project_out.weight,
        )
        return x + y
