"""Tasks, one file each. Importing this folder registers every module in it: adding a task is adding one file."""

import importlib
import pkgutil

from tsugiki.common.tasks.base import TASKS, Task

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["TASKS", "Task"]
