"""Seeded faults in a package of kernels: a copy of it with one text replaced, beside the real one."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path


def load_with_fault(kernels: types.ModuleType, old: str, new: str, folder: Path, name: str) -> types.ModuleType:
    """The package `kernels`, written to `folder`, as a sibling `name` of it. The caller takes it out of sys.modules."""
    sources = {path.name: path.read_text() for path in Path(kernels.__file__).parent.glob("*.py")}
    assert any(old in source for source in sources.values()), f"the kernels no longer say {old!r}"
    for file, source in sources.items():
        (folder / file).write_text(source.replace(old, new))
    full_name = f"{kernels.__name__.rpartition('.')[0]}.{name}"
    spec = importlib.util.spec_from_file_location(
        full_name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[full_name] = module
    spec.loader.exec_module(module)
    return module


def unload(module: types.ModuleType) -> None:
    for name in [name for name in sys.modules if name == module.__name__ or name.startswith(f"{module.__name__}.")]:
        del sys.modules[name]
