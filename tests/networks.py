"""Every network at a size that tests can afford."""

import torch

from attnsr import archs

#: Arguments of each network, so that every mechanism is met within 40 pixels.
SMALL = {
    'ELAN': {'m_elan': 4, 'c_elan': 12, 'n_share': 1, 'window_sizes': (2, 4, 8)},
    'DLGSANet': {'dim': 12, 'num_groups': 2, 'num_blocks': 1, 'num_heads': 3, 'tlc_size': 16},
    'ASID': {'num_feat': 16, 'num_groups': 2, 'esa_channels': 4},
    'LCoAN': {'num_feat': 8, 'num_groups': 3, 'num_blocks': 1, 'num_clusters': 4, 'chunk_size': 24},
}


def build(name, **arguments):
    """The small network, with the same parameters each time; as after a step of training."""
    torch.manual_seed(0)
    return trained_once(getattr(archs, name)(**{**SMALL[name], **arguments}))


def trained_once(net):
    """Run a batch in training mode, from which BatchNorm and k-means have their statistics."""
    net.train()(torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)))
    return net
