"""FFTLoss against NumPy's transform and the sum that defines it."""

import numpy as np
import pytest
import torch

from attnsr.losses import FFTLoss

# isort: split
# Not importable on current libraries before attnsr.
from basicsr.losses import build_loss


def images(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def parts(pred, target):
    """Absolute real and imaginary parts of the difference of the spectra, (N, C, H, W, 2), by the defining sum."""
    height, width = pred.shape[2:]
    rows, columns = (np.exp(-2j * np.pi * np.outer(range(n), range(n)) / n) for n in (height, width))
    pred, target = (np.einsum('uh,nchw,wv->ncuv', rows, image.double().numpy(), columns) for image in (pred, target))
    return np.stack((np.abs(pred.real - target.real), np.abs(pred.imag - target.imag)), axis=-1)


@pytest.mark.parametrize('size', [(1, 1), (1, 6), (7, 5), (8, 8), (13, 10)], ids=lambda size: f'{size[0]}x{size[1]}')
@pytest.mark.parametrize(('reduction', 'reduce'), [('none', np.asarray), ('mean', np.mean), ('sum', np.sum)])
def test_equals_the_defining_sum(size, reduction, reduce):
    pred, target = images(2, 3, *size)
    loss = FFTLoss(loss_weight=0.1, reduction=reduction)(pred, target)
    assert loss.dtype == torch.float64
    np.testing.assert_allclose(loss.numpy(), 0.1 * reduce(parts(pred, target)), rtol=1e-10, atol=1e-12)


def test_a_wave_has_its_four_coefficients():
    height, width, amplitude = 12, 10, 0.3
    rows = torch.arange(height, dtype=torch.float64)[:, None]
    columns = torch.arange(width, dtype=torch.float64)
    wave = amplitude * torch.cos(2 * torch.pi * (2 * rows / height + 3 * columns / width) + torch.pi / 4)
    loss = FFTLoss(reduction='none')(wave[None, None], torch.zeros(1, 1, height, width, dtype=torch.float64))
    expected = torch.zeros_like(loss)
    expected[0, 0, 2, 3] = expected[0, 0, -2, -3] = amplitude * height * width / 2 / 2**0.5
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)


def test_gradient():
    pred, target = images(1, 2, 5, 4)
    assert torch.autograd.gradcheck(FFTLoss(loss_weight=0.7), (pred.requires_grad_(), target.requires_grad_()))


@pytest.mark.parametrize('size', [1, 9, 16])
@pytest.mark.parametrize('value', [0.0, 1.0])
def test_equal_images(size, value):
    target = torch.full((1, 3, size, size), value)
    pred = target.clone().requires_grad_()
    loss = FFTLoss()(pred, target)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(pred.grad, torch.zeros_like(pred))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('target_dtype', [torch.float32, None], ids=['float32 target', 'same'])
def test_half_precision_computes_in_float32(dtype, target_dtype):
    pred, target = images(1, 3, 33, 47, dtype=dtype)
    target = target.to(target_dtype or dtype)
    expected = parts(pred, target).mean()
    pred.requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = FFTLoss()(pred, target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert pred.grad.dtype == dtype
    assert pred.grad.abs().max() > 0


def test_float64_stays_float64_under_autocast():
    pred, target = images(1, 1, 6, 7)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = FFTLoss()(pred, target)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(parts(pred, target).mean(), rel=1e-12)


def test_built_from_options():
    pred, target = images(1, 3, 8, 6)
    loss = build_loss({'type': 'FFTLoss', 'loss_weight': 0.1, 'reduction': 'sum'})(pred, target)
    assert loss.item() == pytest.approx(0.1 * parts(pred, target).sum())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'reduction': 'avg'}, "reduction must be one of none, mean, sum, got 'avg'"),
        ({'loss_weight': -1.0}, 'loss_weight must be a finite number of at least 0, got -1'),
        ({'loss_weight': float('nan')}, 'loss_weight must be a finite number of at least 0, got nan'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_loss({'type': 'FFTLoss', **options})


def test_wrong_images():
    pred, target = images(2, 3, 8, 6)
    with pytest.raises(ValueError, match=r'one shape \(N, C, H, W\), got \(2, 3, 8, 6\) and \(1, 3, 8, 6\)'):
        FFTLoss()(pred, target[:1])
    with pytest.raises(ValueError, match=r'one shape \(N, C, H, W\), got \(3, 8, 6\)'):
        FFTLoss()(pred[0], target[0])
    with pytest.raises(ValueError, match='FFTLoss takes no element-wise weight'):
        FFTLoss()(pred, target, torch.ones_like(pred))
