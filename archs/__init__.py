"""The networks, each registered in BasicSR's ``ARCH_REGISTRY``."""

from attnsr.archs.elan_arch import ELAN

__all__ = ['ELAN']
