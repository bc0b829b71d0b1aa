"""Install attnsr: the repository's top-level folders become sub-packages of ``attnsr``."""

import sys

from setuptools import setup

if sys.version_info >= (3, 13):
    raise SystemExit(
        'attnsr needs Python 3.10, 3.11 or 3.12, and this is Python '
        f'{sys.version_info.major}.{sys.version_info.minor}. It builds on BasicSR, which is published as a source '
        "archive only, and that archive's setup.py reads its version out of exec()'s local variables: Python 3.13 "
        "no longer allows this (KeyError: '__version__'), so pip cannot build it. Make the environment with an older "
        'Python, for example: python3.12 -m venv .venv'
    )

# Top-level folders of the repository that are sub-packages: archs/ is attnsr.archs, and so on.
FOLDERS = [
    'archs',
    'benchmarks',
    'data_prep',
    'docs',
    'losses',
    'ops',
    'ops/channel_attention',
    'ops/cluster_attention',
    'ops/dynamic_conv',
    'ops/gated_feed_forward',
    'ops/separable_conv',
    'ops/shift_linear',
    'ops/window_attention',
    'options',
]

setup(
    packages=[
        'attnsr',
        'attnsr.compat',
        'attnsr.inspection',
        'attnsr.pictures',
        *(f'attnsr.{folder.replace("/", ".")}' for folder in FOLDERS),
    ],
    py_modules=['basicsr_command'],
    package_dir={'': 'src', **{f'attnsr.{folder.replace("/", ".")}': folder for folder in FOLDERS}},
    package_data={'attnsr': ['py.typed'], 'attnsr.docs': ['results.json'], 'attnsr.options': ['*.yml']},
    include_package_data=False,  # of what the source archive holds besides, nothing is installed
)
