"""The networks, each registered in BasicSR's ``ARCH_REGISTRY``."""
