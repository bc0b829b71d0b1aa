"""The figures that the papers publish of their networks, from ``docs/results.json``."""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

__all__ = ['PublishedResult', 'find']


@dataclass(frozen=True)
class PublishedResult:
    """One row of a paper.

    Attributes:
        psnr: In dB, on Y, as printed.
        ssim: On Y, as printed.
        source: Paper and arXiv number.
        measured: How, as far as it is known.
    """

    psnr: float
    ssim: float
    source: str
    measured: str


def find(network: str | None, scale: int, data_set: str) -> PublishedResult | None:
    """What was published of a network on a data set; None where no figure is known.

    Args:
        network: One of :data:`attnsr.archs.variants.VARIANTS`; None for any other, of which nothing is published.
        scale: The scale factor.
        data_set: One of :data:`attnsr.data_prep.layouts.BENCHMARKS`.
    """
    content = _content()
    wanted = {'network': network, 'scale': scale, 'data_set': data_set}
    for row in content['results']:
        if wanted.items() <= row.items():
            source = content['sources'][row['source']]
            title = f'{source["paper"]}, arXiv {source["arxiv"]}'
            return PublishedResult(row['psnr'], row['ssim'], title, source['measured'])
    return None


@cache
def _content() -> dict[str, Any]:
    return json.loads((resources.files('attnsr.docs') / 'results.json').read_text(encoding='utf-8'))
