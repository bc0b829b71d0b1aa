"""Rebuild the weights and inputs behind the reference figures in golden/.

The figures in ``<variant>_x<scale>_<mode>.npz`` are outputs of each paper's published network, run in
float64 on weights that this file rebuilds from nothing but the parameter's published name and shape.
So no weights need to be stored: ``seeded_state_dict`` gives, for every variant, a state dict in the
*published* naming, exactly as a checkpoint released by the authors would look. ELAN's figures are taken at
``img_range = 1``.

NumPy's legacy ``RandomState`` stream is frozen, so the numbers are the same on every machine.
"""

import json
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / 'golden'
GAIN = 0.7


def seeded_array(name, shape):
    """Float64 array for the parameter called ``name`` (a published name); None if it is a fixed constant."""
    fixed = ('sub_mean.', 'add_mean.', 'shift_conv.weight', 'num_batches_tracked', 'rel_pos_indices')
    if any(part in name for part in fixed):
        return None
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith('initted'):
        return np.array(True)
    if name.endswith('running_var'):
        return rng.uniform(0.5, 1.5, shape)
    if name.endswith('running_mean'):
        return 0.1 * rng.standard_normal(shape)
    if name.endswith('kmeans.means'):
        means = rng.standard_normal(shape)
        return means / np.linalg.norm(means, axis=-1, keepdims=True)
    if name.endswith('temperature'):
        return 1.0 + 0.3 * np.abs(rng.standard_normal(shape))
    if name.endswith('rel_pos_bias.weight'):
        return 0.5 * rng.standard_normal(shape)
    if name == 'a':
        return np.zeros(shape)
    if 'modules_gmsa' in name and name.endswith('project_inp.1.weight'):
        return 0.4 * (1.0 + 0.1 * rng.standard_normal(shape))  # keeps ELAN's unscaled softmax from saturating
    if len(shape) >= 2 and ('modules_gmsa' in name or 'modules_lfe' in name):
        return 0.4 * rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    if len(shape) >= 2:
        return GAIN * rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    if name.endswith('bias'):
        return 0.05 * rng.standard_normal(shape)
    return 1.0 + 0.1 * rng.standard_normal(shape)


def seeded_state_dict(variant, scale):
    """{published name: float64 array} for every parameter and buffer that is not a fixed constant."""
    shapes = json.loads((HERE / f'{variant}_x{scale}_keys.json').read_text())
    arrays = {name: seeded_array(name, tuple(shape)) for name, shape in shapes.items()}
    return {name: array for name, array in arrays.items() if array is not None}


def seeded_image(shape, seed=0):
    """Float64 batch in [0, 1], (B, 3, H, W): smooth colour waves plus noise, so that attention has structure."""
    rng = np.random.RandomState(seed)
    batch, channels, height, width = shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    image = np.empty(shape)
    for b in range(batch):
        for c in range(channels):
            fy, fx, phase = rng.uniform(0.05, 0.6), rng.uniform(0.05, 0.6), rng.uniform(0, 6.28)
            image[b, c] = 0.5 + 0.35 * np.sin(fy * y + fx * x + phase) + 0.05 * rng.standard_normal((height, width))
    return image.clip(0, 1)


def sample_positions(size, count=2000, seed=1):
    """Flat indices of the output values that the figures keep."""
    rng = np.random.RandomState(seed)
    return np.sort(rng.choice(size, min(count, size), replace=False))
