"""Models are filled wholly or stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints.small_models import WEIGHTS, is_untouched, module_with, saved

from moat_kernels.checkpoints import CheckpointError, load_checkpoint


class Marked(torch.Tensor):
    """A subclass that torch.load is allowed to restore."""


# How to make a tensor, which may warn, and what messages call it.
UNUSUAL: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(2).to_sparse(), "torch.sparse_coo"),
    "compressed": (lambda: torch.eye(2).to_sparse_csr(), "torch.sparse_csr"),
    "meta": (lambda: torch.empty(2, 2, device="meta"), "on the meta device, without data"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.quint8),
        r"quantised \(torch.quint8\)",
    ),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2)] * 2), "a nested tensor"),
    "subclass": (lambda: torch.eye(2).as_subclass(Marked), "a Marked"),
    "complex": (lambda: torch.eye(2) * 1j, "torch.complex64"),
    "bool": (lambda: torch.eye(2).bool(), "torch.bool"),
}


@pytest.mark.filterwarnings("ignore:Sparse|torch.quantize|The PyTorch API of nested|TypedStorage")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_tensors_that_cannot_be_copied_leave_the_model_untouched(tmp_path: Path, kind: str) -> None:
    make, complaint = UNUSUAL[kind]
    model = module_with({"a": torch.ones(3), "b": torch.ones(2, 2), "c": torch.ones(3)})
    path = saved(tmp_path, {"a": torch.ones(3), "b": make(), "c": torch.ones(3)})
    with (
        torch.serialization.safe_globals([Marked]),
        pytest.raises(CheckpointError, match=rf"x\.ckpt: b is {complaint} in the file"),
    ):
        load_checkpoint(model, path)
    assert is_untouched(model)


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        (torch.empty(2, device="meta"), "on the meta device, without data"),
        (torch.zeros(2).as_subclass(Marked), "a Marked"),
        (torch.zeros(2).to_sparse(), "torch.sparse_coo"),
    ],
)
def test_models_that_cannot_be_filled(tmp_path: Path, tensor: Any, complaint: str) -> None:
    model = module_with({"a": torch.ones(3)})
    model.register_buffer("b", tensor)
    with pytest.raises(CheckpointError, match=f"the model's b is {complaint}: checkpoints are"):
        load_checkpoint(model, saved(tmp_path, {"a": torch.ones(3), "b": torch.ones(2)}))
    assert not model.get_buffer("a").any()


def test_a_model_whose_shapes_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the model's weight is a UninitializedParameter"):
        load_checkpoint(torch.nn.LazyLinear(2), saved(tmp_path, {"weight": torch.ones(2, 2)}))


def test_a_model_made_in_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = module_with(WEIGHTS)
    with pytest.raises(CheckpointError, match=r"the model's stem\.weight was made in inference"):
        load_checkpoint(model, saved(tmp_path, WEIGHTS))


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    model = module_with({"a.x": torch.ones(2), "b.x": torch.ones(2), "empty": torch.ones(0)})
    model.get_submodule("b").x = model.get_submodule("a").x
    file = {"a.x": torch.ones(2), "b.x": torch.full((2,), 2.0), "empty": torch.ones(0)}
    with pytest.raises(CheckpointError, match=r"a\.x and b\.x are one tensor in the model"):
        load_checkpoint(model, saved(tmp_path, file))
    assert is_untouched(model)
    load_checkpoint(model, saved(tmp_path, file | {"b.x": torch.ones(2)}))
    assert model.get_buffer("a.x").all()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def fail(*_: object) -> None:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("hook", [fail, interrupt])
def test_a_copy_that_breaks_off_leaves_the_model_as_it_was(
    tmp_path: Path, hook: Callable[..., None], swap: bool
) -> None:
    model = module_with(WEIGHTS)
    model.register_buffer("one_in_all_places", torch.zeros(1).expand(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = saved(tmp_path, WEIGHTS | {"one_in_all_places": torch.ones(3)})
    model.register_load_state_dict_post_hook(hook)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        with pytest.raises((CheckpointError, KeyboardInterrupt), match=r"which is as before: |^$"):
            load_checkpoint(model, path)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
