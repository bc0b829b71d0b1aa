"""The networks, each registered in BasicSR's ``ARCH_REGISTRY``."""

from attnsr.archs.asid_arch import ASID
from attnsr.archs.dlgsanet_arch import DLGSANet
from attnsr.archs.elan_arch import ELAN
from attnsr.archs.lcoan_arch import LCoAN

__all__ = ['ASID', 'DLGSANet', 'ELAN', 'LCoAN']
