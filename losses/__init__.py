"""Losses that BasicSR's option files can name, each registered in BasicSR's ``LOSS_REGISTRY``."""

from attnsr.losses.fft_loss import FFTLoss
from attnsr.losses.msssim_loss import MSSSIMLoss

__all__ = ['FFTLoss', 'MSSSIMLoss']
