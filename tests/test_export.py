"""Leaving PyTorch: torch.export, AOTInductor, ONNX with two runtimes; TorchScript refuses."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_model import RESOLUTION, make_model
from support.tolerances import BACKEND_OUTPUT, EXPORTED_OUTPUT, assert_close
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels.ops.common.backends import backend_status

EXAMPLE_BATCH, OTHER_BATCH = 2, 5
# Its CPU plugin computes in bfloat16 where the CPU has it, unless told otherwise.
OPENVINO_IN_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def model() -> mk.MOAT:
    """A fused model in eval mode with running statistics away from 0 and 1."""
    model = make_model(torch.float32, window_size=(None, None, 4, None))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def make_images(batch: int) -> Tensor:
    return torch.randn(batch, 3, RESOLUTION, RESOLUTION)


def export(model: nn.Module) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(
        model, (make_images(EXAMPLE_BATCH),), dynamic_shapes={"x": {0: batch}}
    )


@pytest.fixture(scope="module")
def program(model: mk.MOAT) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return export(model)


def test_export_matches_at_every_batch_size(model, program) -> None:
    for batch in (EXAMPLE_BATCH, OTHER_BATCH, 1):
        images = make_images(batch)
        with torch.no_grad():
            assert_close(program.module()(images), model(images), BACKEND_OUTPUT[torch.float32])


def test_exported_programs_need_no_python_operator(program) -> None:
    """What the package implements in Python stays behind: only native operators of ours remain."""
    ours = {
        str(node.target).split(".")[1]
        for node in program.graph.nodes
        if str(node.target).startswith("moat_kernels.")
    }
    native = {"cpu_stem_eval", "cpu_mbconv_eval", "cpu_attention_half_eval"}
    assert ours == (native if backend_status()["cpu"].usable else set())


def test_exported_programs_can_be_saved(model, program) -> None:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    images = make_images(OTHER_BATCH)
    with torch.no_grad():
        loaded = torch.export.load(file).module()(images)
        assert_close(loaded, model(images), BACKEND_OUTPUT[torch.float32])


def test_export_with_parameters_that_require_grad(model) -> None:
    images = make_images(OTHER_BATCH)
    with torch.no_grad():
        expected = model(images)
    assert_close(export(model).module()(images), expected, BACKEND_OUTPUT[torch.float32])


def any_size(smallest: int) -> dict[int, torch.export.Dim]:
    """Batch, height and width of maps [B, C, H, W] held open."""
    return {
        0: torch.export.Dim("batch", min=1, max=64),
        2: torch.export.Dim("height", min=smallest, max=1024),
        3: torch.export.Dim("width", min=smallest, max=1024),
    }


# A whole map, whose table is resized, and windows that divide some maps.
WINDOWS = (None, None, (2, 3), None)
MODELS = {
    "fused": {"window_size": WINDOWS},
    "plain": {"window_size": WINDOWS, "fused": False},
    "maps": {"window_size": WINDOWS, "features_only": True, "out_indices": (1, 3)},
    "maps at stride 8": {"features_only": True, "out_indices": (1, -1), "output_stride": 8},
}
EXPORTED_SHAPE = (2, 3, 96, 160)
OTHER_SHAPES = ((1, 3, 64, 64), (3, 3, 97, 40), (2, 3, 33, 224), (4, 3, 128, 129), (1, 3, 160, 90))


def listed(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def check_other_shapes(
    run: Callable[[Tensor], Tensor | list[Tensor]], model: nn.Module, tolerance: float
) -> None:
    """run(images) equals model(images) for images of sizes that were not exported."""
    for shape in OTHER_SHAPES:
        images = torch.randn(shape)
        with torch.no_grad():
            pairs = zip(listed(run(images)), listed(model(images)), strict=True)
            for actual, expected in pairs:
                assert_close(actual, expected, tolerance, str(shape))


@pytest.mark.parametrize("kind", MODELS)
def test_export_of_a_model_for_images_of_every_size(kind: str) -> None:
    model = make_model(torch.float32, **MODELS[kind]).eval()
    sizes = {"x": any_size(33)}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(EXPORTED_SHAPE),), dynamic_shapes=sizes)
    check_other_shapes(program.module(), model, BACKEND_OUTPUT[torch.float32])


@pytest.mark.parametrize("kind", MODELS)
def test_onnx_of_a_model_for_images_of_every_size(kind: str, tmp_path: Path) -> None:
    """In two runtimes."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, path = make_model(torch.float32, **MODELS[kind]).eval(), tmp_path / "model.onnx"
    export_to_onnx(model, torch.randn(EXPORTED_SHAPE), any_size(33), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    check_other_shapes(
        lambda x: [torch.from_numpy(y) for y in session.run(None, {"x": x.numpy()})],
        model,
        EXPORTED_OUTPUT,
    )
    compiled = openvino.Core().compile_model(str(path), "CPU", OPENVINO_IN_FLOAT32)
    check_other_shapes(
        lambda x: [torch.from_numpy(np.asarray(y)) for y in compiled([x.numpy()]).values()],
        model,
        EXPORTED_OUTPUT,
    )


def export_to_onnx(model: nn.Module, x: Tensor, sizes: dict[int, Any], path: Path) -> None:
    """sizes: the axes of x that are held open."""
    torch.onnx.export(
        model,
        (x,),
        path,
        input_names=["x"],
        dynamic_shapes={"x": sizes},
        dynamo=True,
        verbose=False,
    )


WHOLE_MAP = {"stride": 2, "head_dim": 16, "position_size": 4}


@pytest.mark.parametrize("window_size", [None, 2, (2, 3)])
def test_export_of_a_block_for_maps_of_every_size(window_size) -> None:
    """Stock operators alone: no native kernel computes float64. Windows divide some of the maps."""
    dtype = torch.float64
    block = mk.FusedMOATBlock(16, 32, window_size=window_size, **WHOLE_MAP).to(dtype).eval()
    x = torch.randn(2, 16, 10, 14, dtype=dtype)
    with torch.no_grad():
        program = torch.export.export(block, (x,), dynamic_shapes=[any_size(3)])
        for shape in ((1, 16, 3, 16), (3, 16, 4, 4), (2, 16, 13, 9)):
            x = torch.randn(shape, dtype=dtype)
            assert_close(program.module()(x), block(x), BACKEND_OUTPUT[dtype])


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor_of_a_model_for_images_of_every_size(tmp_path: Path) -> None:
    """Plain models do as well, but they take the compiler minutes."""
    model = make_model(torch.float32, **MODELS["fused"]).eval()
    sizes = {"x": any_size(33)}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(EXPORTED_SHAPE),), dynamic_shapes=sizes)
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
    compiled = torch._inductor.aoti_load_package(package)
    check_other_shapes(compiled, model, BACKEND_OUTPUT[torch.float32])


@pytest.fixture(scope="module")
def onnx_file(model: mk.MOAT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx", reason="ONNX is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    export_to_onnx(model, make_images(EXAMPLE_BATCH), {0: batch}, path)
    return path


def test_onnx_has_standard_operators_only(onnx_file: Path) -> None:
    import onnx

    proto = onnx.load(onnx_file)
    onnx.checker.check_model(proto)
    assert {node.domain for node in proto.graph.node} == {""}


def test_onnx_runtime_matches(model: mk.MOAT, onnx_file: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    session = runtime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    for batch in (EXAMPLE_BATCH, OTHER_BATCH):
        images = make_images(batch)
        (actual,) = session.run(None, {"x": images.numpy()})
        with torch.no_grad():
            assert_close(torch.from_numpy(actual), model(images), EXPORTED_OUTPUT)


def test_openvino_matches(model: mk.MOAT, onnx_file: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    compiled = openvino.Core().compile_model(str(onnx_file), "CPU", OPENVINO_IN_FLOAT32)
    images = make_images(OTHER_BATCH)
    actual = np.asarray(compiled([images.numpy()])[0])
    with torch.no_grad():
        assert_close(torch.from_numpy(actual), model(images), EXPORTED_OUTPUT)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript(model: mk.MOAT) -> None:
    """Fused blocks do not become it. Plain ones do by tracing, whatever script would stumble on."""
    images = make_images(1)
    with pytest.raises(RuntimeError, match="fused blocks do not become TorchScript"):
        torch.jit.trace(model, images)
    plain = make_model(torch.float32, fused=False).eval()
    for each in (model, plain):
        with pytest.raises(RuntimeError, match=r"MOAT: torch.jit.script cannot .* fused=False"):
            torch.jit.script(each)
    with torch.no_grad():
        assert_close(torch.jit.trace(plain, images)(images), plain(images), EXPORTED_OUTPUT)
