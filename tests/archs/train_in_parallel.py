"""Run by torchrun: every network learns in two processes, in plain DistributedDataParallel, what one process learns."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import attnsr  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[1]))
from networks import SMALL, build


def main():
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    for name in SMALL:
        train(name)
        dist.barrier()
        if dist.get_rank() == 0:
            print(name, flush=True)
    dist.destroy_process_group()


def train(name):
    rank = dist.get_rank()
    alone = build(name, upscale=2).double()
    parallel = DistributedDataParallel(copy.deepcopy(alone))
    optimizers = [torch.optim.SGD(net.parameters(), 1e-3) for net in (alone, parallel)]
    for step in range(3):  # a parameter without a gradient is an error in the second
        batch = torch.rand(4, 3, 12, 15, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        share = batch[2 * rank : 2 * rank + 2]
        for net, x, optimizer in zip((alone, parallel), (batch, share), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    if not any(
        isinstance(module, torch.nn.BatchNorm2d) for module in alone.modules()
    ):  # whose statistics are a process's
        for (label, p), q in zip(alone.state_dict().items(), parallel.module.state_dict().values(), strict=True):
            torch.testing.assert_close(q, p, msg=lambda m, n=label: f'{name} {n}: {m}')
    for label, p in parallel.module.named_parameters():
        others = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(others, p.detach())
        assert torch.equal(others[0], others[1]), label
        assert p.grad is not None, label


if __name__ == '__main__':
    main()
