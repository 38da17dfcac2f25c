"""Adapter methods, one file each. Importing this folder registers every module in it."""

import importlib
import pkgutil

from tsugiki.common.adapters.base import ADAPTERS, REFUSED, AdapterMethod
from tsugiki.common.adapters.own_base import load_adapter

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["ADAPTERS", "REFUSED", "AdapterMethod", "load_adapter"]
