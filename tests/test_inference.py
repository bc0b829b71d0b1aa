"""Prepared networks: the same result as the plain network's, and from CUDA graphs the very same."""

import logging
from concurrent.futures import ThreadPoolExecutor

import networks
import numpy as np
import pytest
import torch
from golden_recipe import seeded_image
from torch import Tensor

from attnsr import Upscaler, inference
from attnsr.errors import UsageError
from attnsr.inference import PreparedNetwork
from attnsr.memory import free_memory

NAMES = list(networks.SMALL)

#: Norm of the error by that of the result; networks without training amplify rounding.
BOUNDS = {'float32': 2e-5, 'float16': 4e-3, 'bfloat16': 3e-2}

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]


def image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(seeded_image((1, 3, height, width), seed)).float()


def error(y: Tensor, exact: Tensor) -> float:
    return float((y.cpu().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', list(BOUNDS))
@pytest.mark.parametrize('name', NAMES)
def test_prepared_is_as_plain(name: str, dtype: inference.Dtype, device: str) -> None:
    x = image(45, 70)
    with torch.no_grad():
        exact = networks.build(name, upscale=2).double().eval()(x.double())
    prepared = PreparedNetwork(networks.build(name, upscale=2), device, dtype)
    y = prepared(x)
    assert (y.dtype, y.device.type, y.requires_grad) == (torch.float32, device, False)
    assert error(y, exact) < BOUNDS[dtype]
    assert next(prepared.net.parameters()).dtype == inference.DTYPES[dtype]


@pytest.mark.exhaustive
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', NAMES)
def test_compiled_is_as_plain(name: str, device: str) -> None:
    compiled = PreparedNetwork(networks.build(name, upscale=2), device, compiled=True)
    plain = PreparedNetwork(networks.build(name, upscale=2), device)
    for height, width in ((45, 70), (64, 64)):
        x = image(height, width)
        assert error(compiled(x), plain(x).cpu().double()) < BOUNDS['float32']


def test_there_are_no_cuda_graphs_on_the_cpu() -> None:
    with pytest.raises(UsageError, match='fast: replays CUDA graphs, and the device is cpu; leave it out there'):
        PreparedNetwork(networks.build('ASID', upscale=2), 'cpu', fast=True)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', list(BOUNDS))
@pytest.mark.parametrize('name', NAMES)
def test_graphs_replay_the_same_result(name: str, dtype: inference.Dtype) -> None:
    plain, fast = (PreparedNetwork(networks.build(name, upscale=2), 'cuda', dtype, fast) for fast in (False, True))
    for height, width in ((45, 70), (64, 64)):
        for seed in range(4):  # as it is, recorded, replayed twice
            x = image(height, width, seed)
            assert torch.equal(fast(x), plain(x))


@pytest.mark.gpu
def test_few_graphs_are_kept() -> None:
    fast = PreparedNetwork(networks.build('ASID', upscale=2), 'cuda', fast=True)
    for width in range(20, 60):
        for _ in range(2):
            fast(image(20, width))
    assert len(fast._graphs) == inference.GRAPHS


@pytest.mark.gpu
def test_graphs_of_several_threads() -> None:
    plain, fast = (
        Upscaler(networks.build('ELAN', upscale=2), device='cuda', tile=64, fast=fast) for fast in (False, True)
    )
    pictures = [(255 * image(100, 130, seed)[0].permute(1, 2, 0)).byte().numpy() for seed in range(8)]
    wanted = [plain(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for one, other in zip(pool.map(fast, pictures), wanted, strict=True):
                assert np.array_equal(one, other)


@pytest.mark.gpu
def test_memory_is_measured_and_suffices() -> None:
    upscaler = Upscaler(networks.build('ELAN', upscale=2), device='cuda')
    per_pixel = upscaler.prepared.bytes_per_pixel
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    upscaler.tensor(image(500, 600))
    assert torch.cuda.max_memory_allocated() - before < 1.2 * per_pixel * 500 * 600 + 12 * 2 * 4 * 500 * 600
    assert free_memory(torch.device('cuda')) > 2**20


@pytest.mark.gpu
def test_a_gpu_that_runs_out_of_memory(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told of more than it may take: a share of its memory, that suffices for an eighth of the image's."""
    monkeypatch.setattr('attnsr.upscaler.free_memory', lambda device: 2**50)
    upscaler = Upscaler(networks.build('ELAN', upscale=2), device='cuda')
    torch.cuda.empty_cache()
    share = (
        torch.cuda.memory_reserved() + upscaler.prepared.bytes_per_pixel * 1600**2 / 8
    ) / torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        with caplog.at_level(logging.WARNING, 'attnsr'):
            result = upscaler(np.zeros((1600, 1600, 3), np.uint8))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.shape == (3200, 3200, 3)
    assert caplog.records
    assert all('out of memory with a tile of' in record.getMessage() for record in caplog.records)


def convolutions_precision() -> tuple[bool | None, str, str]:
    """By all names that PyTorch has for it; None where it says that they disagree."""
    cudnn = torch.backends.cudnn
    precisions = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        return cudnn.allow_tf32, *precisions
    except RuntimeError:
        return None, *precisions


@pytest.mark.parametrize(
    'program',
    [
        'pass',
        'cudnn.allow_tf32 = False',
        "cudnn.conv.fp32_precision = 'ieee'",
        "cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = 'ieee'",
        "cudnn.allow_tf32 = False; cudnn.conv.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
    ],
)
def test_convolutions_are_exact_whatever_a_program_has_chosen(program: str) -> None:
    """By older names and by newer ones; and afterwards all is as it was, when the last thread leaves."""
    cudnn = torch.backends.cudnn
    generic, before = torch.backends.fp32_precision, convolutions_precision()
    try:
        exec(program)
        chosen = convolutions_precision()
        with inference.exact_convolutions():
            with inference.exact_convolutions():
                assert convolutions_precision() == (False, 'ieee', 'ieee')
            assert convolutions_precision() == (False, 'ieee', 'ieee')
        assert convolutions_precision() == chosen
    finally:
        torch.backends.fp32_precision = generic
        cudnn.allow_tf32 = True
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before[1:]
    assert convolutions_precision() == before
