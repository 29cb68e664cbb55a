"""Who may import whom: held by walking every import statement."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sae_kernels

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sae_kernels"
KERNELS = sorted(PACKAGE.rglob("*.py"))
OPS = {"frame_attention", "causal_conv3d", "token_noise", "edm_loss", "activations", "weight_norm", "qk_prepare"}
IMPLEMENTATIONS = {"reference", "composed", "triton", "cpp"}


def imports(path: Path) -> list[tuple[int, str]]:
    """(relative level, dotted name) of each thing imported; `from .. import x` gives (2, "x")."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" if node.module else a.name for a in node.names]
            found += [(node.level, name) for name in names]
    return found


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_import_only_the_standard_library_torch_triton_and_numpy(path):
    allowed = sys.stdlib_module_names | {"torch", "triton", "numpy", "__future__"}
    for level, name in imports(path):
        assert level > 0 or name.split(".")[0] in allowed, f"{path.name} imports {name}"
        assert level <= len(path.relative_to(PACKAGE).parts)


@pytest.mark.parametrize(
    "path", [p for p in KERNELS if p.parent.name in OPS], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_rooms(path):
    """api -> ops -> one implementation; an implementation knows no other and not the reference."""
    own = [name.split(".")[0] for level, name in imports(path) if level == 1]
    if path.stem in IMPLEMENTATIONS:
        assert not (set(own) & (IMPLEMENTATIONS | {"api", "ops"})), f"{path} imports {own}"
    elif path.stem == "ops":
        assert not (set(own) & {"api", "reference"}), f"{path} imports {own}"
    elif path.stem == "api":
        assert set(own) <= {"ops", "reference"}, f"{path} imports {own}"
    others = [name.split(".")[0] for level, name in imports(path) if level == 2]
    assert not (set(others) & OPS), f"{path} reaches into another op: {others}"


@pytest.mark.parametrize(
    "path", [p for p in KERNELS if p.parent.parent.name in OPS], ids=lambda p: "-".join(p.parts[-3:])
)
def test_rooms_in_rooms(path):
    """An implementation in several files knows of its op the launch configurations alone, and no other op."""
    own, others = ([name.split(".")[0] for level, name in imports(path) if level == up] for up in (2, 3))
    assert path.parent.name in IMPLEMENTATIONS and set(own) <= {"configs"}, f"{path} imports {own}"
    assert not (set(others) & OPS), f"{path} reaches into another op: {others}"


def test_calls_look_for_no_package(monkeypatch):
    q = torch.zeros(1, 1, 4, 8)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: pytest.fail(f"looks for {name}"))
    sae_kernels.frame_attention(q, q, q, sae_kernels.FrameLayout(2, 1))


def test_kernels_need_nothing_else_installed():
    """With everything but torch, triton and numpy made unimportable, the package imports and an op runs."""
    code = """
import sys, importlib.abc
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"av","gymnasium","rich","safetensors","tyro","tensorboard","matplotlib","PIL","scipy","hypothesis","pytest"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch, sae_kernels
layout = sae_kernels.FrameLayout(2, 3)
q = torch.randn(1, 1, layout.sequence_length, 8)
print(sae_kernels.frame_attention(q, q, q, layout).shape[2])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "12", result.stderr


COMMANDS = """; collect; train; sample; evaluate; schedule; info; data check; series train; series sample; series plot; series study;
    images train; images sample; images evaluate; images compare"""


def test_options_are_parsed_without_importing_anything_heavy():
    """`sae --help`, that of every command, and wrong options answer before torch and the like are imported."""
    code = f"""
import contextlib, io, sys
from sae_diffusion.cli import parse
calls = [[*command.split(), "--help"] for command in {COMMANDS!r}.split(";")] + [["train", "--no-such-option"]]
for arguments in calls:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            parse(arguments)
        except SystemExit as end:
            assert end.code == (2 if arguments[-1] != "--help" else 0), (arguments, end.code)
        else:
            raise AssertionError(arguments)
heavy = "torch", "triton", "numpy", "yaml", "gymnasium", "matplotlib", "PIL", "av", "safetensors", "sklearn", "sae_kernels"
print(len(calls), [name for name in heavy if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"},
    )  # fmt: skip
    assert result.stdout.strip() == "17 []", result.stdout + result.stderr


def test_nothing_imports_the_command_line():
    """Apart from the programs themselves: commands import what they run, never the other way round."""
    for path in sorted((ROOT / "python" / "sae_diffusion").rglob("*.py")):
        if path.name in ("cli.py", "demo.py", "__main__.py"):
            continue
        assert not [name for level, name in imports(path) if level and "cli" in name.split(".")], path


HOUSE = ROOT / "python" / "sae_diffusion"


def house_imports(path: Path, package: list[str]) -> set[str]:
    """Modules of sae_diffusion that a module imports, at its top or in a function; not those for type checking only."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.update({name} | {f"{name}.{alias.name}" for alias in node.names})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """The modules of one circle of imports, if there is one."""
    left = {name: set(needs) for name, needs in graph.items()}
    while free := [name for name, needs in left.items() if not needs]:
        for name in free:
            del left[name]
        for needs in left.values():
            needs.difference_update(free)
    if not left:
        return None
    path = [min(left)]
    while len(set(path)) == len(path):
        path.append(min(left[path[-1]]))
    return path[path.index(path[-1]) :]


def test_modules_import_each_other_in_no_circle():
    """Imports inside functions count: a circle that they hide is one all the same. Only packages' own names do not."""
    graph: dict[str, set[str]] = {}
    for path in sorted(HOUSE.rglob("*.py")):
        package = ["sae_diffusion", *path.parent.relative_to(HOUSE).parts]
        if path.name != "__init__.py":
            graph[".".join([*package, path.stem])] = house_imports(path, package)
    graph = {name: needs & graph.keys() for name, needs in graph.items()}
    assert sum(map(len, graph.values())) > 100
    assert not (found := circle(graph)), " -> ".join(found)


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert circle({"a": {"b"}, "b": set()}) is None


def test_public_api_is_documented_and_exported():
    import sae_kernels

    for name in sae_kernels.__all__:
        assert getattr(sae_kernels, name).__doc__, f"{name} has no docstring"


def test_setup_does_not_import_torch_at_top_level():
    tree = ast.parse((ROOT / "setup.py").read_text())
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            assert not any(name.startswith("torch") for name in names)
