"""What the tests of the ops share: inputs in every memory format, and gradients of any function of named tensors."""

import torch


def random(*shape, memory='plain', dtype=torch.float64):
    if memory == 'view':  # the inside of a larger map: contiguous in no format
        b, c, h, w = shape
        return torch.randn(b, c + 2, h + 1, w + 3).to(dtype)[:, 1:-1, 1:, 2:-1]
    x = torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if memory == 'channels-last' else x


def tensors(given):
    return {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}


def in_float64(given):
    return {**given, **{name: value.double() for name, value in tensors(given).items()}}


def with_gradients(function, given, cotangent):
    """The output, and {argument: gradient} of its product with the cotangent."""
    leaves = {name: value.detach().requires_grad_() for name, value in tensors(given).items()}
    y = function(**{**given, **leaves})
    gradients = torch.autograd.grad(y, list(leaves.values()), cotangent.to(y.dtype))
    return y.detach(), dict(zip(leaves, gradients, strict=True))
