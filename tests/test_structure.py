"""The rules of the layout: who imports whom, and how far a module is from its kernels."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moat_kernels
from moat_kernels import FusedMOATBlock, functional, use_backend
from moat_kernels.extension import load_extension
from moat_kernels.functional import MBConvDescription, WindowAttentionDescription
from moat_kernels.ops.triton_support.launch_table import LAUNCH_TABLES
from moat_kernels.ops.triton_support.launching import triton_missing

PACKAGE = Path(moat_kernels.__file__).parent
# Those with backends in folders of their own.
OPS = sorted(path.parent.name for path in PACKAGE.glob("ops/*/contract.py"))
BACKENDS = ("cpu", "torch", "triton")


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("moat_kernels", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(source: str, everywhere: bool = True) -> Iterator[str]:
    """The modules of the package that a source imports; without `everywhere` at its top only."""
    tree = ast.parse(source)
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in inner)


def place(module: str) -> tuple[str, str]:
    """(op, what of it) of a module of ops/: ("mbconv", "cpu") of moat_kernels.ops.mbconv.cpu.fakes;

    empty where there is no such part.
    """
    parts = module.split(".")
    _, _, op, part = (*parts, "", "", "", "")[:4]
    return (op, part) if parts[:2] == ["moat_kernels", "ops"] else ("", "")


def foreign_imports(module: str, source: str) -> list[str]:
    """What a backend's module imports from another backend, or from what calls the backends."""
    outside = (*BACKENDS, "api", "dispatch", "operators", "reference")
    return [
        name
        for name in imports(source)
        if place(name)[0] in OPS and place(name)[1] in outside and place(name) != place(module)
    ]


BACKEND_MODULES = sorted(
    name for name in MODULES if place(name)[0] in OPS and place(name)[1] in BACKENDS
)


@pytest.mark.parametrize("module", BACKEND_MODULES)
def test_a_backend_imports_the_contract_and_the_algebra_never_another_backend(module: str) -> None:
    assert not foreign_imports(module, MODULES[module].read_text())


@pytest.mark.parametrize(
    "line",
    [
        "from moat_kernels.ops.mbconv.torch.backend import forward",
        "from moat_kernels.ops.mbconv.torch import backend",
        "import moat_kernels.ops.mbconv.torch.backend",
        "from moat_kernels.ops.mbconv import reference",
        "from moat_kernels.ops.window_attention.cpu import backend",
        "def late():\n    from moat_kernels.ops.mbconv.api import mbconv",
    ],
)
def test_that_rule_can_be_broken(line: str) -> None:
    assert foreign_imports("moat_kernels.ops.mbconv.cpu.training", line)


SHARED = ("common", "triton_support")


@pytest.mark.parametrize("module", sorted(name for name in MODULES if place(name)[0] in SHARED))
def test_what_all_ops_use_knows_no_op(module: str) -> None:
    used = {place(name)[0] for name in imports(MODULES[module].read_text())}
    assert used <= {"", *SHARED}


# Ops that are made of others: they take those' descriptions.
MADE_OF = {
    "attention_half": {"layer_norm", "window_attention"},
    "frozen": {"attention_half", "mbconv", "stem", "window_attention"},
}


@pytest.mark.parametrize("module", sorted(name for name in MODULES if place(name)[0]))
def test_an_op_imports_no_other_op(module: str) -> None:
    op = place(module)[0]
    used = {place(name)[0] for name in imports(MODULES[module].read_text())}
    assert used <= {"", op, *SHARED, *MADE_OF.get(op, ())}


def test_every_launch_table_registers_itself() -> None:
    """Importing the package is enough for the tuner and for the user's table to know them all."""
    with_kernels = {
        path.parent.parent.name for path in PACKAGE.glob("ops/*/triton/launch_table.py")
    }
    assert with_kernels == set(LAUNCH_TABLES)
    assert all(table.op == op for op, table in LAUNCH_TABLES.items())


def test_no_two_modules_import_each_other() -> None:
    """Not by a chain of others either; imports inside of functions are those of lazy loading."""
    graph = {
        module: [n for n in imports(path.read_text(), everywhere=False) if n in MODULES]
        for module, path in MODULES.items()
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def follow(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for imported in graph.get(module, ()):
                follow(imported, (*trail, module))
            done.add(module)

    for module in graph:
        follow(module, ())


def test_eager_calls_write_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptions are encoded for operators that something watches, and for nothing else."""

    def refuse(description: object) -> str:
        raise AssertionError(f"{description} was encoded")

    for kind in (MBConvDescription, WindowAttentionDescription):
        monkeypatch.setattr(kind, "encode", refuse)
    block = FusedMOATBlock(32, 32, window_size=4)
    x = torch.randn(2, 32, 8, 8, requires_grad=True)
    for backend in ("torch", "cpu") if load_extension().usable else ("torch",):
        with use_backend(backend):
            block.train()(x).sum().backward()
            with torch.no_grad():
                block.eval()(x)
    with pytest.raises(AssertionError, match="was encoded"), torch.no_grad(), FakeTensorMode():
        functional.window_attention(torch.empty(1, 4, 4, 96), None, WindowAttentionDescription(1))


# Prints how many functions of the package are being called, and in how many files, at each native
# training op or Triton launch of a block's inverted bottleneck.
TRACE = """
import sys
from pathlib import Path
import torch
import moat_kernels
from moat_kernels import FusedMOATBlock, use_backend
from moat_kernels.ops.triton_support import launching

backend, root = sys.argv[1], Path(moat_kernels.__file__).parent

def report():
    frame, files = sys._getframe(1), []
    while frame:
        path = Path(frame.f_code.co_filename)
        files += [path] if path.is_relative_to(root) else []
        frame = frame.f_back
    if any(path.is_relative_to(root / "ops" / "mbconv") for path in files):
        print(len(files), len(set(files)))

def seen(function):
    def call(*arguments, **options):
        report()
        return function(*arguments, **options)
    return call

if backend == "triton":
    import triton
    from triton.runtime.interpreter import GridExecutor
    run = launching._run
    def called(*arguments):  # by `launch`, which is counted
        report()
        return run(*arguments)
    launching._run = called
else:
    packet = torch._ops.OpOverloadPacket
    packet.__call__ = seen(packet.__call__)
block = FusedMOATBlock(32, 32, window_size=4)
x = torch.randn(2, 32, 8, 8, requires_grad=True)
with use_backend(backend):
    block(x)
"""


@pytest.mark.parametrize(
    ("backend", "calls", "files"),
    [
        pytest.param(
            *("cpu", 6, 5),
            marks=pytest.mark.skipif(
                not load_extension().usable, reason=f"native kernels {load_extension().reason}"
            ),
        ),
        pytest.param(
            *("triton", 9, 7),
            marks=pytest.mark.skipif(bool(triton_missing()), reason=triton_missing()),
        ),
    ],
)
def test_a_kernel_is_few_calls_away(backend: str, calls: int, files: int) -> None:
    """From a block's forward in training, the last one included."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", TRACE, backend]
    output = subprocess.check_output(command, env=environment, text=True)
    depths = [tuple(map(int, line.split())) for line in output.splitlines()]
    assert len(depths) >= 2
    assert max(depth[0] for depth in depths) <= calls
    assert max(depth[1] for depth in depths) <= files
