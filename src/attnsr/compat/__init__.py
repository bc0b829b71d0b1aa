"""Makes BasicSR 1.4.2 work on current torch, torchvision, NumPy, OpenCV and lmdb, without touching its files.

Each defect is one small patch, in the module of its topic: it says what it mends, sees whether the installed BasicSR
has the defect, and is tested by the failure it prevents. ``PATCHES`` lists them all.
"""

import importlib
import importlib.util
import sys

from attnsr.compat import imports
from attnsr.compat.patches import PATCHES, Patch, rebind

__all__ = ['PATCHES', 'Patch', 'applied', 'apply']

#: Names of the patches that were needed and are applied in this process.
applied: list[str] = []


def apply() -> None:
    """Apply every patch that the installed BasicSR needs and that is not applied yet.

    Raises:
        ImportError: BasicSR is not installed, or cannot be imported.
    """
    if importlib.util.find_spec('basicsr') is None:
        reason = ''
        if sys.version_info >= (3, 13):
            reason = (
                " Its release cannot be built on Python 3.13 or newer (its setup.py reads its version out of exec()'s "
                "local variables, KeyError: '__version__'): use Python 3.10, 3.11 or 3.12."
            )
        raise ImportError(f'attnsr builds on BasicSR, which is not installed: pip install basicsr.{reason}')
    try:
        with imports.without_collections():
            imports.offer_functional_tensor()
            importlib.import_module('basicsr')
    except ImportError as error:
        raise ImportError(
            f'BasicSR is installed but cannot be imported: {error}. If torch and torchvision do not match, install '
            'them together: pip install --upgrade torch torchvision'
        ) from error
    # Only now: these modules import BasicSR.
    for topic in ('distributed', 'environments', 'networks', 'option_files', 'registries', 'resuming', 'saving'):
        importlib.import_module(f'attnsr.compat.{topic}')
    for patch in PATCHES:
        if patch.name not in applied and patch.needed():
            patch.apply()
            applied.append(patch.name)
    rebind()
