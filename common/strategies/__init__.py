"""Strategies, one file a family. Importing this folder registers every module in it."""

import importlib
import pkgutil

from tsugiki.common.strategies.base import STRATEGIES, Strategy, WeightedUpdate, names_with, strategy_of

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["STRATEGIES", "Strategy", "WeightedUpdate", "names_with", "strategy_of"]
