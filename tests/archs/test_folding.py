"""Folding: what eval mode combines in every forward, combined once."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from golden_recipe import seeded_image
from networks import SMALL, build
from torch import Tensor, nn

from attnsr import archs, checkpoints
from attnsr.archs.arch_util import Folding, SRNetwork

each_network = pytest.mark.parametrize('name', SMALL)
#: The networks in which there is something to fold.
FOLDING = ('ELAN', 'ASID')


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(seeded_image((2, 3, 17, 20))).to(dtype)


def small(name: str) -> SRNetwork:
    """A network after a step of training, in eval mode, whose parameters want no gradient."""
    return build(name, upscale=2).eval().requires_grad_(False)


def folding(net: nn.Module) -> list[Folding]:
    return [module for module in net.modules() if isinstance(module, Folding)]


def uses_what_is_kept(net: SRNetwork) -> bool:
    """Whether a forward combines nothing."""
    assert folding(net)
    combined = []
    for module in folding(net):
        module.combine = lambda *sources, combine=module.combine: combined.append(1) or combine(*sources)  # type: ignore
    net(image(next(net.parameters()).dtype))
    for module in folding(net):
        del module.combine
    return not combined


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@each_network
def test_folding_changes_nothing(name: str, dtype: torch.dtype, tolerance: float) -> None:
    net, x = small(name).to(dtype), image(dtype)
    state, published = net.state_dict(), checkpoints.to_published(net)
    with torch.inference_mode():
        expected = net(x)
        assert net.fold_for_inference() is net
        torch.testing.assert_close(net(x), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(net(x), expected, rtol=tolerance, atol=tolerance)  # without ELAN's strips
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    assert list(checkpoints.to_published(net)) == list(published)
    assert bool(folding(net)) == (name in FOLDING)
    if name in FOLDING:
        assert uses_what_is_kept(net)


@pytest.mark.parametrize('name', FOLDING)
def test_folding_before_half_precision_is_in_double(name: str) -> None:
    """What is kept is the exact product, rounded once to each dtype that it goes through."""
    net = small(name).fold_for_inference()
    exact = [[tensor.double() for tensor in module._kept()] for module in folding(net)]
    again = small(name).double().fold_for_inference()
    for kept, module in zip(exact, folding(again), strict=True):
        for one, other in zip(kept, module._kept(), strict=True):
            assert torch.equal(one, other.float().double())
    net.bfloat16()
    for kept, module in zip(exact, folding(net), strict=True):
        assert all(torch.equal(a.bfloat16(), b) for a, b in zip(kept, module._kept(), strict=True))
    assert uses_what_is_kept(net)


@pytest.mark.parametrize('name', FOLDING)
def test_a_folded_network_may_go_to_more_digits(name: str) -> None:
    net, x = small(name), image(torch.float64)
    expected = copy.deepcopy(net).double()(x)
    net.fold_for_inference().double()
    assert uses_what_is_kept(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', FOLDING)
def test_training_after_folding_is_training(name: str) -> None:
    plain, net, x = build(name, upscale=2), build(name, upscale=2), image()
    net.eval().fold_for_inference()
    for each in (plain, net):
        optimizer = torch.optim.SGD(each.train().parameters(), 0.1)
        each(x).square().mean().backward()
        optimizer.step()
        each.eval()
    assert torch.equal(net(x), plain(x))
    assert not any(name.rpartition('.')[2].startswith('_folded') for name, _ in net.named_buffers())


@pytest.mark.parametrize('name', FOLDING)
def test_gradients_in_eval_mode_reach_all_parameters(name: str) -> None:
    net = build(name, upscale=2).eval().fold_for_inference()
    net(image()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


CHANGES: dict[str, Callable[[SRNetwork, SRNetwork], object]] = {
    'load_state_dict': lambda net, other: net.load_state_dict(other.state_dict()),
    'load_state_dict(assign=True)': lambda net, other: net.load_state_dict(other.state_dict(), assign=True),
    'in place': lambda net, other: [a.copy_(b) for a, b in zip(tensors(net), tensors(other), strict=True)],
    'parameter.data': lambda net, other: [
        setattr(a, 'data', b.data) for a, b in zip(tensors(net), tensors(other), strict=True)
    ],
}


def tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.state_dict(keep_vars=True).values()]


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('name', FOLDING)
def test_other_parameters_are_noticed(name: str, change: str) -> None:
    net, other, x = small(name).fold_for_inference(), small(name), image()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
        CHANGES[change](net, other)
        assert torch.equal(net(x), other(x))
        expected = net(x)
        net.fold_for_inference()
        assert uses_what_is_kept(net)
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', FOLDING)
def test_copies_are_folded_too(name: str) -> None:
    net, x = small(name).fold_for_inference(), image()
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert uses_what_is_kept(again)
        assert torch.equal(again(x), net(x))
        assert again.arguments == net.arguments
    with torch.no_grad():
        net.get_parameter(
            next(name for name, _ in net.named_parameters() if 'project_inp' in name or 'to_v' in name)
        ).add_(1)
    assert not uses_what_is_kept(copy.deepcopy(net))


def test_a_folded_network_compiles() -> None:
    torch.compiler.reset()
    net, x = small('ELAN').fold_for_inference(), image()
    compiled = torch.compile(net, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)
    net.load_state_dict({key: 1.25 * tensor for key, tensor in net.state_dict().items()})
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)


@each_network
def test_a_network_tells_its_arguments(name: str) -> None:
    net = build(name, upscale=2)
    assert {**SMALL[name], 'upscale': 2, 'use_checkpoint': False}.items() <= net.arguments.items()
    again = getattr(archs, name)(**net.arguments)
    assert again.arguments == net.arguments
    assert repr(again) == repr(net)
