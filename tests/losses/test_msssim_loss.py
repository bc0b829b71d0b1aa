"""MSSSIMLoss against NumPy and SciPy, scikit-image's SSIM, and images on which powers of the factors break."""

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from skimage import data
from skimage.metrics import structural_similarity

from attnsr.losses import MSSSIMLoss

# isort: split
# Not importable on current libraries before attnsr.
from basicsr.losses import build_loss

PAPER_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SMALL = {'window_size': 5, 'weights': (0.3, 0.3, 0.4)}


def photograph(height, width):
    """(1, 3, height, width) in [0, 1], float64."""
    return torch.tensor(data.astronaut()[:height, :width] / 255).permute(2, 0, 1)[None]


def noisy(image, deviation):
    generator = torch.Generator().manual_seed(0)
    return (image + deviation * torch.randn(image.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)


def factors(x, y, window_size, sigma, scales):
    """mean(c s) at all scales but the last, mean(l c s) there, of two grey NumPy images."""
    distances = np.hypot(*np.mgrid[:window_size, :window_size] - window_size // 2)
    window = np.exp(-(distances**2) / (2 * sigma**2))
    window /= window.sum()
    result = []
    for scale in range(scales):
        if scale > 0:
            height, width = (side // 2 for side in x.shape)
            x, y = (image[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean(axis=(1, 3)) for image in (x, y))
        mean_x, mean_y = convolve2d(x, window, 'valid'), convolve2d(y, window, 'valid')
        variance_x = convolve2d(x**2, window, 'valid') - mean_x**2
        variance_y = convolve2d(y**2, window, 'valid') - mean_y**2
        covariance = convolve2d(x * y, window, 'valid') - mean_x * mean_y
        similarity = (2 * covariance + 0.0009) / (variance_x + variance_y + 0.0009)
        if scale == scales - 1:
            similarity *= (2 * mean_x * mean_y + 0.0001) / (mean_x**2 + mean_y**2 + 0.0001)
        result.append(similarity.mean())
    return np.array(result)


def expected_losses(pred, target, window_size=11, sigma=1.5, weights=PAPER_WEIGHTS):
    """1 - MS-SSIM for each image and channel, (N, C)."""
    exponents = np.array(weights) / sum(weights)
    return np.array(
        [
            [
                1 - np.prod(factors(x, y, window_size, sigma, len(weights)) ** exponents)
                for x, y in zip(*pair, strict=True)
            ]
            for pair in zip(pred.double().numpy(), target.double().numpy(), strict=True)
        ]
    )


@pytest.mark.parametrize(
    ('size', 'options'),
    [
        ((176, 176), {}),
        ((179, 201), {}),
        ((45, 61), {'weights': (0.2, 0.3, 0.5)}),
        ((45, 61), {'weights': (1, 2)}),
        ((21, 34), SMALL),
        ((21, 34), {'window_size': 7, 'sigma': 0.8, 'weights': (1.0,)}),
    ],
    ids=str,
)
def test_equals_numpy(size, options):
    target = torch.cat((photograph(*size), photograph(*size).flip(3)))
    pred = noisy(target, 0.1)
    loss = MSSSIMLoss(reduction='none', **options)(pred, target)
    assert loss.dtype == torch.float64
    np.testing.assert_allclose(loss.numpy(), expected_losses(pred, target, **options), rtol=1e-10)


def test_one_scale_is_ssim():
    target = photograph(60, 83)
    pred = noisy(target, 0.1)
    loss = MSSSIMLoss(weights=(1.0,), reduction='none')(pred, target)
    for channel in range(3):
        _, similarity = structural_similarity(
            *(image[0, channel].numpy() for image in (pred, target)),
            data_range=1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        assert loss[0, channel].item() == pytest.approx(1 - similarity[5:-5, 5:-5].mean(), rel=1e-10)


def test_mean_and_weight():
    target = photograph(24, 40)
    pred = noisy(target, 0.1)
    loss = MSSSIMLoss(loss_weight=0.5, **SMALL)(pred, target)
    assert loss.item() == pytest.approx(0.5 * expected_losses(pred, target, **SMALL).mean())


def test_gradient():
    target = photograph(13, 12)[:, :1]
    pred = noisy(target, 0.05)
    loss = MSSSIMLoss(window_size=3, weights=(0.4, 0.6))
    assert torch.autograd.gradcheck(loss, (pred.requires_grad_(), target.requires_grad_()))


def test_gradient_where_images_are_negatively_correlated():
    target = photograph(13, 12)[:, :1]
    loss = MSSSIMLoss(window_size=3, weights=(0.4, 0.6))
    assert loss(1 - target, target) > 1
    assert torch.autograd.gradcheck(loss, ((1 - target).requires_grad_(), target.requires_grad_()))


def checkerboard():
    return (torch.arange(180)[:, None] // 2 + torch.arange(180) // 2).remainder(2).expand(1, 3, 180, 180)


HARD_TARGETS = {
    'photograph': photograph(180, 180),
    'zeros': torch.zeros(1, 3, 180, 180),
    'ones': torch.ones(1, 3, 180, 180),
    'checkerboard': checkerboard(),
}
HARD_PREDICTIONS = {
    'identical': lambda target: target.clone(),
    'inverted': lambda target: 1 - target,
    'zeros': torch.zeros_like,
    'constant': lambda target: torch.full_like(target, 0.5),
    'negative': lambda target: -target,
    'nearly constant': lambda target: 0.5 + 1e-4 * target,
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('prediction', HARD_PREDICTIONS)
@pytest.mark.parametrize('target', HARD_TARGETS)
def test_finite_on_hard_images(target, prediction, dtype):
    target = HARD_TARGETS[target].to(dtype)
    pred = HARD_PREDICTIONS[prediction](target).requires_grad_()
    loss = MSSSIMLoss()(pred, target)
    loss.backward()
    assert pred.grad.isfinite().all()
    if torch.equal(pred, target):
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert pred.grad.abs().max() < 1e-6
    else:
        assert 1e-3 < loss.item() < 2


def test_descends_from_the_inverted_image():
    target = photograph(48, 48)
    pred = (1 - target).requires_grad_()
    loss = MSSSIMLoss(**SMALL)
    optimizer = torch.optim.Adam([pred], lr=0.02)
    start = loss(pred, target).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss(pred, target).backward()
        optimizer.step()
    assert start > 1.3
    assert loss(pred, target).item() < 0.01


def test_loss_is_continuous_at_the_floor():
    """From constant to slightly inverted, the factors pass the floor and 0: no step, and always worse."""
    target = photograph(48, 48)
    mean = target.mean()
    loss = MSSSIMLoss(**SMALL)
    contrasts = torch.linspace(0.02, -0.2, 501, dtype=torch.float64)
    losses = torch.stack([loss(mean + contrast * (target - mean), target) for contrast in contrasts])
    steps = losses.diff()
    assert losses[0] < 1 < losses[-1]
    assert (steps > 0).all()
    assert steps.max() < 0.01


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('target_dtype', [torch.float32, None], ids=['float32 target', 'same'])
def test_half_precision_computes_in_float32(dtype, target_dtype):
    # Bright and of little contrast: the variances are lost in half precision.
    target = (0.9 + 0.05 * photograph(45, 61)).to(dtype)
    pred = noisy(target.double(), 0.02).to(dtype)
    target = target.to(target_dtype or dtype)
    expected = expected_losses(pred, target, **SMALL).mean()
    pred.requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = MSSSIMLoss(**SMALL)(pred, target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, abs=2e-4)
    assert pred.grad.dtype == dtype
    assert pred.grad.isfinite().all()
    assert pred.grad.abs().max() > 0


def test_built_from_options():
    target = photograph(24, 40)
    pred = noisy(target, 0.1)
    options = {
        'type': 'MSSSIMLoss',
        'loss_weight': 2,
        'window_size': 5,
        'weights': [0.3, 0.3, 0.4],
        'reduction': 'none',
    }
    loss = build_loss(options)(pred, target)
    np.testing.assert_allclose(loss.numpy(), 2 * expected_losses(pred, target, **SMALL))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'reduction': 'sum'}, "reduction must be one of none, mean, got 'sum'"),
        ({'loss_weight': -1.0}, 'loss_weight must be a finite number of at least 0, got -1'),
        ({'window_size': 8}, 'window_size must be odd and at least 3, got 8'),
        ({'window_size': 1}, 'window_size must be odd and at least 3, got 1'),
        ({'sigma': 0.0}, 'sigma must be a finite number greater than 0, got 0'),
        ({'weights': []}, r'weights must be .* one for each scale, at least one; got \[\]'),
        ({'weights': [0.5, 0.0]}, r'weights must be finite numbers greater than 0.* got \[0.5, 0.0\]'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_loss({'type': 'MSSSIMLoss', **options})


@pytest.mark.parametrize('window_size', [3, 11])
@pytest.mark.parametrize('scales', [1, 2, 4])
def test_smallest_size(window_size, scales):
    loss = MSSSIMLoss(window_size=window_size, weights=[1.0] * scales)
    least = window_size * 2 ** (scales - 1)
    target = photograph(least, least + 1)
    assert 0 < loss(noisy(target, 0.1), target) < 1
    too_small = target[:, :, :-1]
    with pytest.raises(ValueError, match=rf'at least {least} x {least} pixels, got {least - 1} x {least + 1}'):
        loss(too_small, too_small)


@pytest.mark.parametrize(('side', 'fitting'), [(11, 1), (21, 1), (22, 2), (64, 3), (175, 4)])
def test_too_small_says_how_many_weights_fit(side, fitting):
    target = photograph(side, 200)
    with pytest.raises(ValueError, match=f'at most {fitting} of the weights'):
        MSSSIMLoss()(target, target)
    assert MSSSIMLoss(weights=PAPER_WEIGHTS[:fitting])(target, target).item() == pytest.approx(0, abs=1e-12)


def test_smaller_than_the_window():
    target = photograph(10, 10)
    with pytest.raises(ValueError, match='one weight and a smaller window_size'):
        MSSSIMLoss()(target, target)


def test_wrong_images():
    target = photograph(24, 24)
    with pytest.raises(ValueError, match=r'one shape \(N, C, H, W\), got \(1, 3, 24, 24\) and \(1, 1, 24, 24\)'):
        MSSSIMLoss(**SMALL)(target, target[:, :1])
