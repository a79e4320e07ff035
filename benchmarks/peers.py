"""Other ways to run a model's forward pass on a CPU, each as a function of a batch of images.

OpenVINO and ONNX Runtime come with the extra `bench` and are left out where they are missing; they
get the stock model as ONNX, torch.compile gets it with its weights frozen.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from contextlib import redirect_stdout

import torch
from torch import Tensor

Forward = Callable[[], object]

_PACKAGES = {"OpenVINO": ("openvino", "onnx"), "ONNX Runtime": ("onnxruntime", "onnx")}


def available_peers() -> list[str]:
    """The names that `make_peer` can make here."""
    return [
        "torch.compile",
        *(
            name
            for name, packages in _PACKAGES.items()
            if all(importlib.util.find_spec(package) for package in packages)
        ),
    ]


def make_peer(name: str, model: torch.nn.Module, x: Tensor) -> Forward:
    """A forward pass of `model` on `x` by the runtime called `name`, in this process's threads."""
    if name == "torch.compile":
        return _compiled(model, x)
    if name == "OpenVINO":
        return _openvino(to_onnx(model, x), x)
    return _onnxruntime(to_onnx(model, x), x)


def to_onnx(model: torch.nn.Module, x: Tensor) -> bytes:
    """The model as ONNX for inputs of x's shape."""
    file = io.BytesIO()
    with redirect_stdout(io.StringIO()):  # the exporter reports its progress there
        program = torch.onnx.export(model.eval(), (x,), dynamo=True)
    assert program is not None
    program.save(file)
    return file.getvalue()


def _compiled(model: torch.nn.Module, x: Tensor) -> Forward:
    options = {"freezing": True}
    compiled = torch.compile(model, options=options)

    @torch.no_grad()
    def call() -> Tensor:
        return compiled(x)

    return call


def _openvino(program: bytes, x: Tensor) -> Forward:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(program, b""),
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


def _onnxruntime(program: bytes, x: Tensor) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    images = {name: x.contiguous().numpy()}
    return lambda: session.run(None, images)
