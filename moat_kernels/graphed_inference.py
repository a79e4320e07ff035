"""Inference captured in CUDA graphs: the host launches a model, not its kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from moat_kernels import graph_recorder
from moat_kernels.graphed_model import refuse_graphed


def graphed_inference(
    model: nn.Module, example: Tensor, *, autocast_dtype: torch.dtype | None = None
) -> Callable[[Tensor], Any]:
    """Inference as one CUDA graph: `run(images)` gives what `model(images)` does, in new tensors.

    Without gradients, under autocast if that is asked for. Where the model is on a CPU it runs as
    it is, without a graph, so that scripts run anywhere.

    model: in eval mode; it may return a tensor, or lists, tuples and dictionaries of them.
    example: images [B, C, H, W] as the first call will have them, on any device. Its shape and
        memory format are captured at once; a call with others captures them then, which takes as
        long as some calls. All graphs share their temporary memory. Images are copied, from pinned
        memory without waiting.
    autocast_dtype: of autocast; None: without, even inside of one.

    Weights that are changed in place (`load_state_dict`, an optimiser's step, an average of
    weights) are seen. All else that Python decides is as it was at the capture: the modes of
    submodules (the model's own is looked at), hooks, which do not run again, environment variables.
    Of two threads only one may call it at a time.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.ReLU()).eval()
    >>> run = graphed_inference(model, torch.randn(1, 3, 8, 8))
    >>> run(torch.randn(4, 3, 8, 8)).shape
    torch.Size([4, 2, 8, 8])

    Raises ValueError for a model with modules in training mode, without parameters or with some on
    several devices, and where it returns something else; RuntimeError where the capture fails, and
    from a call after the model was set to training or a parameter or buffer was moved to other
    memory.
    """
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1:
        raise ValueError(
            f"all parameters of model must be on one device, got {', '.join(devices) or 'none'}"
        )
    if training := [name for name, module in model.named_modules() if module.training]:
        raise ValueError(
            "model must be in eval mode (model.eval()), and is in training mode"
            + (f": its {training[0]}" if training[0] else "")
        )
    inference = _Inference(model, torch.device(devices[0]), autocast_dtype)
    if inference.device.type not in graph_recorder.CAPTURED:
        return inference
    refuse_graphed(model)
    graphed = _GraphedInference(inference)
    graphed.prepare(example)
    return graphed


class _Inference:
    """The model's call, run kernel by kernel."""

    def __init__(
        self, model: nn.Module, device: torch.device, autocast_dtype: torch.dtype | None
    ) -> None:
        self.model = model
        self.device = device
        self.autocast_dtype = autocast_dtype

    def __call__(self, images: Tensor) -> Any:
        if self.model.training:
            raise RuntimeError("the model was set to training mode: call model.eval()")
        autocast = graph_recorder.autocast_for_capture(self.device, self.autocast_dtype)
        with torch.no_grad(), autocast:
            return self.model(images.to(self.device))


@dataclass(frozen=True)
class _Captured:
    """A graph, the images that it reads and what it writes."""

    images: Tensor
    replay: Callable[[], None]
    result: Any


class _GraphedInference:
    """Inference as graphs, one for each kind of images."""

    def __init__(self, inference: _Inference) -> None:
        self.inference = inference
        self.recorder = graph_recorder.Recorder(inference.device)
        self.graphs: dict[object, _Captured] = {}
        self.memory = self._memory()

    def __call__(self, images: Tensor) -> Any:
        if self.inference.model.training or self._memory() != self.memory:
            raise RuntimeError(
                "the model was set to training mode, or a parameter or buffer was moved to other "
                "memory, after inference was captured: call graphed_inference again"
            )
        captured = self.prepare(images)
        captured.images.copy_(images, non_blocking=True)
        captured.replay()
        # The next replay overwrites them, and that of another graph may.
        return tree_map_only(Tensor, torch.clone, captured.result)

    def prepare(self, images: Tensor) -> _Captured:
        """The graph for images of this shape, layout and dtype, captured unless it is there."""
        key = (images.shape, images.stride(), images.dtype)
        if key not in self.graphs:
            self.graphs[key] = self._captured(images)
        return self.graphs[key]

    def _captured(self, images: Tensor) -> _Captured:
        images = images.detach().to(self.inference.device, copy=True)
        call = partial(self.inference, images)
        for _ in range(graph_recorder.WARM_UP - 1):
            self.recorder.run(call)
        try:
            self.recorder.rehearse(call)
            replay, result = self.recorder.capture(call)
        except RuntimeError as error:
            raise RuntimeError(
                "the model cannot be captured in a CUDA graph: something in it, or a hook, may "
                "wait for the GPU (.item(), .cpu(), printing a tensor)"
            ) from error
        for leaf in tree_leaves(result):
            if not isinstance(leaf, (Tensor, int, float, str, type(None))):
                raise ValueError(
                    "model must return tensors, or lists, tuples and dictionaries of them, and "
                    f"returns a {type(leaf).__name__}"
                )
        return _Captured(images, replay, result)

    def _memory(self) -> list[int]:
        model = self.inference.model
        return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
