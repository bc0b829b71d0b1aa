"""Channel attention against the definition, computed group by group in float64."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from agreement import in_float64, random, tensors, with_gradients

from attnsr.ops.channel_attention import channel_attention, reference

# Error allowed to each element: absolute, and relative to the exact figure for the same, already rounded, inputs.
TOLERANCES = {
    torch.float64: {'atol': 1e-12, 'rtol': 1e-12},
    torch.float32: {'atol': 1e-5, 'rtol': 1e-5},
    torch.float16: {'atol': 1e-2, 'rtol': 1e-2},
    torch.bfloat16: {'atol': 6e-2, 'rtol': 6e-2},
}
# Gradients pass through more products of rounded figures.
GRADIENT_TOLERANCES = {dtype: {name: 10 * value for name, value in at.items()} for dtype, at in TOLERANCES.items()}
# Layout, window size; height, width.
CASES = [
    (('image', None), (1, 1)),
    (('image', None), (5, 7)),
    (('windows', 1), (2, 3)),
    (('windows', 4), (4, 4)),
    (('windows', 3), (6, 9)),
    (('grid', 1), (2, 3)),
    (('grid', 4), (4, 4)),
    (('grid', 3), (6, 9)),
    (('overlapping', 4), (1, 1)),
    (('overlapping', 4), (4, 4)),
    (('overlapping', 4), (3, 8)),
    (('overlapping', 4), (5, 17)),
    (('overlapping', 2), (3, 9)),
    (('overlapping', 1), (2, 3)),
    (('overlapping', 5), (26, 2)),  # 6 windows along 26, the last three have pixels in common
]
# Channels, heads, rows of the weight.
SHAPES = [(3, 1, None), (6, 2, None), (4, 4, None), (6, 2, 5), (5, 1, 9)]
MODES = {'autograd': torch.enable_grad, 'no_grad': torch.no_grad, 'inference': torch.inference_mode}

cases = pytest.mark.parametrize(
    ('layout', 'size'), [pytest.param(*case, id=f'{case[0][0]}{case[0][1] or ""} {case[1]}') for case in CASES]
)
shapes = pytest.mark.parametrize('shape', SHAPES, ids=str)
activations = pytest.mark.parametrize('activation', ['relu', 'softmax'])
memories = pytest.mark.parametrize('memory', ['plain', 'channels-last', 'view'])
dtypes = pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)


def groups_of(layout, height, width):
    """For each group the (rows, columns) of its tokens; their product is the group."""
    name, size = layout
    if name == 'image':
        return [(range(height), range(width))]
    if name == 'windows':
        return [(range(y, y + size), range(x, x + size)) for y in range(0, height, size) for x in range(0, width, size)]
    if name == 'grid':
        return [(range(i, height, size), range(j, width, size)) for i in range(size) for j in range(size)]

    def windows(side):
        k = min(size, side)
        n = math.ceil(side / k)
        step = k if n == 1 else math.ceil((side - k) / (n - 1) - 1e-8)
        return [range(start, start + k) for start in [*range(0, (n - 1) * step, step), side - k]]

    return [(rows, columns) for rows in windows(height) for columns in windows(width)]


def defined(qkv, temperature, activation, heads, layout, weight):
    channels = qkv.shape[1] // 3
    total, count = torch.zeros_like(qkv[:, :channels]), torch.zeros_like(qkv[:1, :1])
    for rows, columns in groups_of(layout, *qkv.shape[2:]):
        at = (..., torch.tensor(rows)[:, None], torch.tensor(columns))
        tokens = qkv[at]
        q, k, v = tokens.flatten(2).unflatten(1, (3, heads, channels // heads)).unbind(1)
        scores = torch.einsum('bhit,bhjt->bhij', F.normalize(q, dim=-1), F.normalize(k, dim=-1))
        scores = scores * temperature.reshape(-1, 1, 1)
        a = scores.clamp(min=0) if activation == 'relu' else scores.exp() / scores.exp().sum(-1, keepdim=True)
        y = torch.einsum('bhij,bhjt->bhit', a, v).reshape(len(v), channels, len(rows), len(columns))
        total[at] = total[at] + y
        count[at] = count[at] + 1
    y = total / count
    return y if weight is None else torch.einsum('oc,bchw->bohw', weight[:, :, 0, 0], y)


def arguments(layout, size, shape, activation='softmax', memory='channels-last', dtype=torch.float64, batch=2):
    torch.manual_seed(0)
    channels, heads, rows = shape
    qkv = random(batch, 3 * channels, *size, memory=memory, dtype=dtype)
    qkv += qkv.sign() / 2  # gradients are inverse to norms: none that rounding alone would decide
    return {
        'qkv': qkv,
        'temperature': (1 + torch.rand(heads, 1, 1)).to(dtype),
        'activation': activation,
        'heads': heads,
        'layout': layout,
        'weight': None if rows is None else random(rows, channels, 1, 1, dtype=dtype) / channels**0.5,
    }


def attend(layout, **given):
    return channel_attention(layout=layout[0], window_size=layout[1], **given)


def assert_agrees(given, function=attend):
    """The output and every gradient equal the definition's for the same inputs; dtypes are those of the inputs."""
    dtype = given['qkv'].dtype
    expected = defined(**in_float64(given))
    cotangent = torch.randn_like(expected).to(dtype)
    y, gradients = with_gradients(function, given, cotangent)
    _, expected_gradients = with_gradients(defined, in_float64(given), cotangent.double())
    torch.testing.assert_close(y, expected.to(dtype), **TOLERANCES[dtype])
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient,
            expected_gradients[name].to(dtype),
            **GRADIENT_TOLERANCES[dtype],
            msg=lambda text, at=name: f'{at}: {text}',
        )


@activations
@shapes
@cases
def test_equals_the_definition(layout, size, shape, activation):
    assert_agrees(arguments(layout, size, shape, activation))


@memories
@cases
def test_any_memory_format(layout, size, memory):
    assert_agrees(arguments(layout, size, (6, 2, 5), memory=memory))


@pytest.mark.parametrize('chunk', [1, 400, 2**20], ids='chunks of {}'.format)
@cases
def test_without_autograd(monkeypatch, layout, size, chunk):
    """A few groups at a time; nothing that was passed in is written to."""
    monkeypatch.setattr(reference, 'CHUNK_ELEMENTS', chunk)
    for mode, shape in product(('no_grad', 'inference'), SHAPES):
        given = arguments(layout, size, shape)
        before = {name: value.clone() for name, value in tensors(given).items()}
        with MODES[mode]():
            y = attend(**given)
        torch.testing.assert_close(y, defined(**given), **TOLERANCES[torch.float64])
        for name, value in before.items():
            assert torch.equal(given[name], value), name


def test_images_of_a_batch_are_apart():
    given = arguments(('overlapping', 4), (5, 9), (6, 2, 5), batch=3)
    each = [attend(**{**given, 'qkv': image[None]}) for image in given['qkv']]
    torch.testing.assert_close(attend(**given), torch.cat(each), **TOLERANCES[torch.float64])


@pytest.mark.parametrize('layout', [('image', None), ('windows', 2), ('grid', 2), ('overlapping', 3)], ids=str)
@activations
def test_gradcheck(layout, activation):
    given = arguments(layout, (4, 2), (4, 2, 3), activation, batch=1)
    leaves = {name: value.requires_grad_() for name, value in tensors(given).items()}

    def function(*values):
        return attend(**{**given, **dict(zip(leaves, values, strict=True))})

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize('value', [0.0, 1e-14], ids=str)
@cases
def test_channels_that_hold_nothing(layout, size, value):
    """Norms below the least that is divided by; 0 too, where a norm has no gradient."""
    given = arguments(layout, size, (6, 2, 5))
    given['qkv'][:, [0, 4, 7, 11]] *= value
    given['qkv'][0] *= value
    given['activation'] = 'softmax'  # whose gradient at scores of 0 is defined
    assert_agrees(given)


@dtypes
@cases
def test_other_dtypes(layout, size, dtype):
    for shape in SHAPES:
        assert_agrees(arguments(layout, size, shape, dtype=dtype))


@pytest.mark.parametrize('mode', MODES)
@activations
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_sums_of_half_precision_do_not_overflow(dtype, activation, mode):
    """Sums of squares of 1e7 over the tokens, where float16 ends at 65504."""
    given = arguments(('image', None), (40, 50), (6, 2, 5), activation, dtype=dtype, batch=1)
    given['qkv'] = (100 * given['qkv']).requires_grad_(mode == 'autograd')
    with MODES[mode]():
        y = attend(**given)
    expected = defined(**in_float64(given))
    torch.testing.assert_close(y / 100, (expected / 100).to(dtype), **TOLERANCES[dtype])


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@cases
def test_autocast(layout, size, dtype, mode):
    """bfloat16 out of float32 or bfloat16, the scores in float32."""
    given = arguments(layout, size, (6, 2, 5), dtype=torch.bfloat16)
    given = {**given, **{name: value.to(dtype) for name, value in tensors(given).items()}}
    given['qkv'].requires_grad_(mode == 'autograd')
    with MODES[mode](), torch.autocast('cpu', dtype=torch.bfloat16):
        y = attend(**given)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, defined(**in_float64(given)).bfloat16(), **TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize('layout', [('image', None), ('windows', 3), ('grid', 3), ('overlapping', 4)], ids=str)
def test_compiled_whole(layout):
    torch.compiler.reset()
    assert_agrees(arguments(layout, (9, 12), (6, 2, 5)), torch.compile(attend, backend='aot_eager', fullgraph=True))
    compiled = torch.compile(attend, backend='eager', fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((9, 12), (3, 6)):
            given = arguments(layout, size, (6, 2, 5))
            torch.testing.assert_close(compiled(**given), defined(**given), **TOLERANCES[torch.float64])


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('layout', [('image', None), ('windows', 2), ('grid', 2), ('overlapping', 3)], ids=str)
def test_maps_without_pixels(layout, mode):
    for batch, size in ((0, (4, 4)), (1, (0, 4)), (1, (4, 0))):
        given = arguments(layout, size, (6, 2, 5), batch=batch)
        given['weight'].requires_grad_(mode == 'autograd')
        with MODES[mode]():
            y = attend(**given)
        assert y.shape == (batch, 5, *size)
        if mode == 'autograd':
            assert not torch.autograd.grad(y.sum(), given['weight'])[0].any()


def test_the_operator_that_compilers_see_is_as_registered():
    given = arguments(('overlapping', 4), (5, 7), (6, 2, 5))
    x, weight = given['qkv'].permute(0, 2, 3, 1), given['weight'].flatten(1)
    for matrix in (weight, None):
        torch.library.opcheck(
            torch.ops.attnsr.overlapping_channel_attention, (x, given['temperature'], 'softmax', 2, 4, matrix)
        )


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'activation': 'gelu'}, r"activation 'gelu' is not known; valid: 'relu', 'softmax'"),
        ({'layout': 'rows'}, r"layout 'rows' is not known; valid: 'image', 'windows', 'grid', 'overlapping'"),
        ({'qkv': torch.zeros(18, 4, 4)}, r'qkv of shape \(B, 3C, H, W\).* got \(18, 4, 4\), heads = 2'),
        ({'heads': 4}, r'C a multiple of heads; got \(1, 18, 4, 6\), heads = 4'),
        ({'heads': 0}, r'heads = 0'),
        ({'temperature': torch.ones(3, 1, 1)}, r'temperature .*\(2, 1, 1\).* got \(3, 1, 1\)'),
        ({'window_size': 2}, r"window_size must be None for the layout 'image'; got 2"),
        ({'layout': 'grid'}, r"window_size must be a side of at least 1 pixel for the layout 'grid'; got None"),
        ({'layout': 'overlapping', 'window_size': 0}, r'window_size must be a side of at least 1 pixel .*; got 0'),
        ({'layout': 'windows', 'window_size': 4}, r'multiples of the window size 4 .* got \(1, 18, 4, 6\)'),
        ({'layout': 'grid', 'window_size': 3}, r'multiples of the window size 3 .* got \(1, 18, 4, 6\)'),
        ({'weight': torch.zeros(6, 5, 1, 1)}, r'weight .*\(O, 6, 1, 1\); got \(6, 5, 1, 1\)'),
        ({'weight': torch.zeros(6, 6)}, r'weight .*\(O, 6, 1, 1\); got \(6, 6\)'),
    ],
)
def test_wrong_arguments_say_what_is_right(change, message):
    given = {'qkv': torch.zeros(1, 18, 4, 6), 'temperature': torch.ones(2, 1, 1), 'activation': 'relu', 'heads': 2}
    with pytest.raises(ValueError, match=message):
        channel_attention(**{**given, **change})
