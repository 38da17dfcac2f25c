"""The script that the fresh process runs."""

import ast
import sys
from pathlib import Path

from tsugiki.server.export import probe as export_probe


def test_it_imports_nothing_of_this_project():
    """Catches: an import by which an export is loaded with the help of the code that wrote it."""
    tree = ast.parse(Path(export_probe.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "runpy" in imported
    foreign = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert foreign == {"numpy", "torch"}
