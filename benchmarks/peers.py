"""Other ways to run a model: runtimes for its forward pass on a CPU, and checkpointing.

OpenVINO and ONNX Runtime come with the extra `bench` and are left out where they are missing; they
get the stock model as ONNX, torch.compile gets it with its weights frozen.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from device import chosen
from interleaved import SPIN_SECONDS, Contender
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moat_kernels.reference import MBConvBlock

Forward = Callable[[], object]

_PACKAGES = {"OpenVINO": ("openvino", "onnx"), "ONNX Runtime": ("onnxruntime", "onnx")}
RUNTIMES = tuple(
    name
    for name, packages in _PACKAGES.items()
    if chosen() == "cpu" and all(importlib.util.find_spec(package) for package in packages)
)


def make_peers(names: Sequence[str], model: torch.nn.Module, x: Tensor) -> dict[str, Contender]:
    """Forward passes of `model` (in eval) on `x`, by those of `names` that are runtimes.

    All use the threads of this process.
    """
    peers = {}
    if "torch.compile" in names:
        peers["torch.compile"] = Contender(_compiled(model, x))
    makers = {"OpenVINO": _openvino, "ONNX Runtime": _onnxruntime}
    spins = {"ONNX Runtime": 0.1}  # 60 ms were measured
    wanted = [name for name in names if name in makers]
    if not wanted:
        return peers
    with TemporaryDirectory() as folder:
        program = to_onnx(model, x, Path(folder))
        for name in wanted:
            forward = makers[name](program, x)
            peers[name] = Contender(forward, keeps_memory=True, spins=spins.get(name, SPIN_SECONDS))
    return peers


def compiled(function: Callable[..., Tensor], **options: bool) -> Callable[..., Tensor]:
    """torch.compile of a function or module; what was compiled before is forgotten."""
    torch.compiler.reset()  # past the eighth shape of a function it would run eagerly
    return torch.compile(function, options=options)


def checkpointed(block: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """The block's forward with its activations computed again in backward.

    The reentrant kind, because it saves the block's input where it can be counted.
    """
    return partial(checkpoint, block.forward, use_reentrant=True)


def checkpoint_blocks(model: torch.nn.Module) -> torch.nn.Module:
    """Every stock block of the model checkpointed, in place."""
    for module in model.modules():
        if isinstance(module, MBConvBlock):
            module.forward = checkpointed(module)
    return model


def to_onnx(model: torch.nn.Module, x: Tensor, folder: Path) -> Path:
    """A file of the model as ONNX for inputs of x's shape; large weights lie beside it."""
    file = folder / "model.onnx"
    with redirect_stdout(io.StringIO()):  # the exporter reports its progress there
        program = torch.onnx.export(model.eval(), (x,), dynamo=True)
    assert program is not None
    program.save(file)
    return file


def _compiled(model: torch.nn.Module, x: Tensor) -> Forward:
    forward = compiled(model, freezing=True)
    return torch.no_grad()(lambda: forward(x))


def _openvino(program: Path, x: Tensor) -> Forward:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(program),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    request = compiled.create_infer_request()
    images = x.contiguous().numpy()
    return lambda: request.infer([images])


def _onnxruntime(program: Path, x: Tensor) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    images = {name: x.contiguous().numpy()}
    return lambda: session.run(None, images)
