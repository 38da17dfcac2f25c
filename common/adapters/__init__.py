"""Adapter methods, one file each. Importing this folder registers every module in it."""

import importlib
import pkgutil

from tsugiki.common.adapters.base import ADAPTERS, REFUSED, AdapterMethod

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["ADAPTERS", "REFUSED", "AdapterMethod"]
