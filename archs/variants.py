"""The published networks: which class and which arguments each is built with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attnsr.archs.arch_util import SRNetwork
from attnsr.archs.asid_arch import ASID
from attnsr.archs.dlgsanet_arch import DLGSANet
from attnsr.archs.elan_arch import ELAN
from attnsr.archs.lcoan_arch import LCoAN

__all__ = ['SCALES', 'VARIANTS', 'Variant']

#: The scale factors that each variant is published for.
SCALES = (2, 3, 4)


@dataclass(frozen=True)
class Variant:
    """A published network.

    Attributes:
        name: As its option files are named, ``<name>_x<scale>.yml``.
        title: As the paper writes it.
        network: Its class.
        paper: Authors, venue and arXiv number.
        arguments: Of the class, where they differ from its defaults; ``upscale`` aside.
    """

    name: str
    title: str
    network: type[SRNetwork]
    paper: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self, scale: int) -> SRNetwork:
        """The network for one of :data:`SCALES`, with new parameters."""
        return self.network(upscale=scale, **self.arguments)


_ELAN = 'Zhang et al., ECCV 2022, arXiv 2203.06697'
_DLGSANET = 'Li et al., ICCV 2023, arXiv 2301.02031'
_ASID = 'Park et al., AAAI 2025, arXiv 2501.15774'
_LCOAN = 'Zhao et al., 2024, arXiv 2404.04922'

#: {name: variant}.
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant('elan', 'ELAN', ELAN, _ELAN),
        Variant('elan_light', 'ELAN-light', ELAN, _ELAN, {'m_elan': 24, 'c_elan': 60, 'n_share': 1}),
        Variant('dlgsanet', 'DLGSANet', DLGSANet, _DLGSANET),
        Variant('dlgsanet_light', 'DLGSANet-light', DLGSANet, _DLGSANET, {'dim': 48, 'num_groups': 4, 'num_blocks': 3}),
        Variant('dlgsanet_tiny', 'DLGSANet-tiny', DLGSANet, _DLGSANET, {'dim': 48, 'num_groups': 3, 'num_blocks': 3}),
        Variant('asid', 'ASID', ASID, _ASID),
        Variant('asid_d8', 'ASID-D8', ASID, _ASID, {'num_groups': 8}),
        Variant('lcoan', 'LCoAN', LCoAN, _LCOAN),
    )
}
