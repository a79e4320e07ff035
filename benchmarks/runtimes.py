"""Runtimes that a model's forward pass can be left to, each used as its own documentation says.

All prepare weights once and use the threads of this process. A name without a precision is the
runtime as users meet it: OpenVINO then multiplies in bfloat16 where the CPU can, the others in
float32. int8 is post-training quantisation with the same calibration images for all (images.py).
Those whose packages are missing are left out; the extra `bench` has all but zentorch, which needs a
PyTorch of its own version and an AMD processor.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from device import chosen
from interleaved import SPIN_SECONDS, Contender
from peers import compiled
from torch import Tensor

Forward = Callable[[], Tensor]

_INPUT, _BATCH = "images", "batch"


@dataclass
class Served:
    """A stock model in eval mode, the batch that is measured, and batches to calibrate int8 by."""

    model: torch.nn.Module
    x: Tensor
    calibration: Sequence[Tensor] = ()

    @cached_property
    def _folder(self) -> TemporaryDirectory:
        return TemporaryDirectory()

    def file(self, name: str) -> Path:
        """In a folder that lasts as long as this."""
        return Path(self._folder.name) / name

    @cached_property
    def onnx(self) -> Path:
        """The model for batches of any size, as int8 is calibrated with another one."""
        two = self.x.new_zeros(2, *self.x.shape[1:])  # of one image it would be for one only
        with redirect_stdout(io.StringIO()):  # the exporter reports its progress there
            program = torch.onnx.export(
                *(self.model, (two,)),
                input_names=[_INPUT],
                dynamic_shapes=({0: torch.export.Dim(_BATCH)},),
                dynamo=True,
            )
        assert program is not None
        file = self.file("model.onnx")
        program.save(file)
        return file


def available(*names: str) -> tuple[str, ...]:
    """Those of the runtimes named that can be used here."""
    return tuple(
        name
        for name in names
        if (chosen() == "cpu" or _RUNTIMES[name].on_gpu)
        and all(importlib.util.find_spec(package) for package in _RUNTIMES[name].packages)
    )


def make_runtime(name: str, served: Served) -> Contender:
    """The forward pass of `served` by a runtime; its call returns the output."""
    runtime = _RUNTIMES[name]
    return Contender(runtime.make(served), keeps_memory=runtime.keeps_memory, spins=runtime.spins)


def _torch(served: Served, dtype: torch.dtype | None = None, **arguments: Any) -> Forward:
    """dtype: of autocast."""
    forward = compiled(served.model, **arguments)

    @torch.no_grad()
    def call() -> Tensor:
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            return forward(served.x)

    return call


def _zentorch(served: Served) -> Forward:
    importlib.import_module("zentorch")  # PyTorch then knows it
    return _torch(served, backend="zentorch", dynamic=False)


def _openvino(served: Served, int8: bool = False, **settings: str) -> Forward:
    import openvino

    core = openvino.Core()
    model = core.read_model(served.onnx)
    if int8:
        model = _quantize_openvino(model, served.calibration)
    model.reshape(list(served.x.shape))
    settings = {"PERFORMANCE_HINT": "LATENCY", **settings}
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    infer = core.compile_model(model, "CPU", {**settings, **threads})
    images = served.x.contiguous().numpy()
    return lambda: torch.from_numpy(infer([images])[0])


def _quantize_openvino(model: Any, calibration: Sequence[Tensor]) -> Any:
    """By NNCF's settings for transformers: no slower than the others, half the error."""
    import nncf

    with redirect_stdout(io.StringIO()):  # progress bars
        return nncf.quantize(
            model,
            nncf.Dataset([batch.numpy() for batch in calibration]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(calibration),
        )


def _onnxruntime(served: Served, quantize: Callable[[Served], Path] | None = None) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_free_dimension_override_by_name(_BATCH, len(served.x))
    program = served.onnx if quantize is None else quantize(served)
    session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
    images = {_INPUT: served.x.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, images)[0])


def _quantize_statically(served: Served) -> Path:
    """Products alone: with all that it can quantise it is slower and no more exact.

    Its pre-processing is left out: the exporter has done that, and nothing changes.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        batches = iter(served.calibration)

        def get_next(self) -> dict[str, Any] | None:
            return next(({_INPUT: batch.numpy()} for batch in self.batches), None)

    file = served.file("static.onnx")
    quantize_static(
        *(served.onnx, file, Reader()),
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        use_external_data_format=True,
    )
    return file


def _quantize_dynamically(served: Served) -> Path:
    """Without the convolutions, which are slower so."""
    from onnxruntime.quantization import quantize_dynamic

    file = served.file("dynamic.onnx")
    quantize_dynamic(
        *(served.onnx, file),
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        use_external_data_format=True,
    )
    return file


class _Runtime(NamedTuple):
    """packages: that it needs. keeps_memory, spins: of its contender."""

    make: Callable[[Served], Forward]
    packages: tuple[str, ...] = ()
    keeps_memory: bool = False
    spins: float = SPIN_SECONDS
    on_gpu: bool = False


_EXPORT = ("onnx", "onnxscript")
_OPENVINO = _Runtime(_openvino, ("openvino", *_EXPORT), keeps_memory=True)
# 60 ms of spinning were measured.
_ONNX_RUNTIME = _Runtime(_onnxruntime, ("onnxruntime", *_EXPORT), keeps_memory=True, spins=0.1)
_FROZEN = {"options": {"freezing": True}}
_RUNTIMES = {
    "torch.compile": _Runtime(partial(_torch, **_FROZEN), on_gpu=True),
    "torch.compile bfloat16": _Runtime(partial(_torch, dtype=torch.bfloat16, **_FROZEN)),
    "zentorch": _Runtime(_zentorch, ("zentorch",)),
    "OpenVINO": _OPENVINO,
    "OpenVINO float32": _OPENVINO._replace(make=partial(_openvino, INFERENCE_PRECISION_HINT="f32")),
    "OpenVINO int8": _OPENVINO._replace(
        make=partial(_openvino, int8=True), packages=(*_OPENVINO.packages, "nncf")
    ),
    "ONNX Runtime": _ONNX_RUNTIME,
    "ONNX Runtime int8": _ONNX_RUNTIME._replace(
        make=partial(_onnxruntime, quantize=_quantize_statically)
    ),
    "ONNX Runtime int8 dynamic": _ONNX_RUNTIME._replace(
        make=partial(_onnxruntime, quantize=_quantize_dynamically)
    ),
}
RUNTIMES = available(*_RUNTIMES)
