"""Training steps captured in CUDA graphs: the host launches a step, not its kernels."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer

from moat_kernels import graph_recorder
from moat_kernels.graphed_model import refuse_graphed

# What these keep for a parameter is zero before their first step.
_START_AT_ZERO = (Adam, AdamW, SGD)


def graphed_step(
    model: nn.Module,
    loss: Callable[[Any, Tensor], Tensor],
    optimizer: Optimizer,
    example: tuple[Tensor, Tensor],
    *,
    autocast_dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A training step as one CUDA graph: `step(images, labels)` gives the loss, a new tensor [].

    A step is `loss(model(images), labels)` under autocast, backward, and the optimiser's step. The
    gradients are gone after it. Where the model is on a CPU the step runs as it is, without a graph
    and without the refusals below, so that scripts run anywhere.

    loss: of (what the model returns, labels); a scalar.
    example: (images, labels) as the first call will have them, on any device. Their shapes are
        captured at once; a call with others captures them then, which takes as long as some
        steps. All graphs share their temporary memory. Inputs are copied, from pinned memory
        without waiting.
    autocast_dtype: of autocast, for model and loss; None: without, even inside of one.
    scaler: torch.amp.GradScaler, which then takes part; the optimiser must be made with
        `fused=True`, as others ask the host whether gradients are finite.

    Warming up and capturing leave parameters, buffers, the optimiser's state, the scaler and the
    random numbers as they were. Drop path and dropout draw anew in every step.

    Adam, AdamW and others that have it need `capturable=True`, which on a CPU takes `fused=True`. A
    number is read once: a learning rate that a scheduler changes must be a tensor on the GPU, which
    takes `fused=True` for SGD too:

    >>> model = torch.nn.Linear(3, 2)
    >>> lr = torch.tensor(0.1, device=model.weight.device)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True, capturable=True)
    >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    >>> example = torch.randn(8, 3), torch.randint(2, (8,))
    >>> step = graphed_step(model, torch.nn.functional.cross_entropy, optimizer, example)
    >>> step(*example).shape
    torch.Size([])
    >>> scheduler.step()

    All else that Python decides is as it was at the capture too: `requires_grad`, the modes of
    submodules (the model's own is looked at), hooks, which do not run again, environment variables.
    What should happen between backward and the update, clipping for one, goes into a hook of the
    optimiser (`register_step_pre_hook`), which sees scaled gradients beside a scaler. A training
    loop must keep no earlier loss or output of the model with its autograd graph.

    Raises ValueError for what cannot be captured: an optimiser without `capturable=True`, one that
    keeps numbers on the host, one other than Adam, AdamW and SGD that has not taken a step yet, a
    scaler without `fused=True`, parameters on several devices, modules that replace their buffers
    in forward (those are not restored), DistributedDataParallel. Raises
    RuntimeError where the capture fails, and from a step after something was changed that it does
    not see: a setting of the optimiser, its state by `load_state_dict`, memory of a parameter or
    buffer.
    """
    step = _Step(model, loss, optimizer, autocast_dtype, scaler)
    if step.device.type not in graph_recorder.CAPTURED:
        return step
    _check(step)
    graphed = _GraphedStep(step)
    graphed.prepare(*example)
    return graphed


class _Step:
    """The step, run kernel by kernel."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Tensor], Tensor],
        optimizer: Optimizer,
        autocast_dtype: torch.dtype | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.autocast_dtype = autocast_dtype
        self.scaler = scaler
        self.modules = [module for module in (model, loss) if isinstance(module, nn.Module)]
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        own = [parameter for module in self.modules for parameter in module.parameters()]
        # Each once.
        self.parameters = list(dict.fromkeys((*own, *trained)))
        self.buffers = self.current_buffers()
        self.device = self.parameters[0].device

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        images, labels = images.to(self.device), labels.to(self.device)
        self.drop_gradients()
        with graph_recorder.autocast_for_capture(self.device, self.autocast_dtype):
            loss = self.loss(self.model(images), labels)
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.drop_gradients()
        return loss.detach()

    def current_buffers(self) -> list[Tensor]:
        return [buffer for module in self.modules for buffer in module.buffers()]

    def drop_gradients(self) -> None:
        """Of parameters that the optimiser does not know as well: a graph would add to those."""
        for parameter in self.parameters:
            parameter.grad = None


def _check(step: _Step) -> None:
    """Raise ValueError for what cannot be captured, as far as it shows before a step."""
    optimizer, name = step.optimizer, type(step.optimizer).__name__
    if isinstance(step.model, DistributedDataParallel):
        raise ValueError(
            "model must not be wrapped in DistributedDataParallel, which may be around a "
            "graphed_model"
        )
    refuse_graphed(step.model)
    devices = sorted({str(parameter.device) for parameter in step.parameters})
    if len(devices) > 1:
        raise ValueError(f"all parameters must be on one device, got some on {', '.join(devices)}")
    if not all(group.get("capturable", True) for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer must be made for CUDA graphs: {name}(..., fused=True, capturable=True)"
        )
    scales = step.scaler is not None and step.scaler.is_enabled()
    if scales and not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"with a scaler the optimizer must be {name}(..., fused=True): others ask the host "
            "whether the gradients are finite"
        )
    # SGD's dampening does not apply to the first step.
    known = type(optimizer) in _START_AT_ZERO and not any(
        group.get("dampening") for group in optimizer.param_groups
    )
    trained = (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
    if not known and not all(optimizer.state.get(parameter) for parameter in trained):
        raise ValueError(
            f"optimizer must have taken a step: what the state of {name} is before the first is "
            "not known, as it is of Adam, AdamW and SGD without dampening"
        )


def _seen(value: object, device: torch.device) -> object:
    """What a graph keeps of a value: which tensor of its device it is, or the number in it."""
    if not isinstance(value, Tensor) or value.device == device:
        return value
    return value.tolist()


def _changed(before: object, now: object) -> bool:
    if isinstance(before, Tensor) or isinstance(now, Tensor):
        return before is not now
    return before != now


def _settings(step: _Step) -> dict[str, object]:
    """The optimiser's settings as a graph keeps them, by what they are called in messages."""
    return {"number of parameter groups": len(step.optimizer.param_groups)} | {
        f"{name} of parameter group {number}": _seen(value, step.device)
        for number, group in enumerate(step.optimizer.param_groups)
        for name, value in group.items()
        if name != "params"
    }


def _states(step: _Step) -> dict[str, object]:
    """The same of what the optimiser keeps for each parameter."""
    return {
        f"{name} of parameter {number}": _seen(value, step.device)
        for number, state in enumerate(step.optimizer.state.values())
        for name, value in state.items()
    }


@contextlib.contextmanager
def _restoring(step: _Step) -> Iterator[None]:
    """Afterwards all that a step changes is as it was before."""
    optimizer, scaler = step.optimizer, step.scaler
    settings = [dict(group) for group in optimizer.param_groups]
    states = {
        parameter: {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
        for parameter, state in optimizer.state.items()
    }
    scale = None if scaler is None else scaler.state_dict()
    with graph_recorder.restoring([*step.parameters, *step.buffers], step.device):
        try:
            yield
        finally:
            step.drop_gradients()
            with torch.no_grad():
                for parameter, state in optimizer.state.items():
                    _restore_state(state, states.get(parameter, {}))
            for group, before in zip(optimizer.param_groups, settings, strict=True):
                group.update(before)
            if scaler is not None and scale is not None:
                scaler.load_state_dict(scale)


def _restore_state(state: dict[str, Any], before: dict[str, Any]) -> None:
    """In place, as graphs know the tensors by their memory; what was not there before is zero."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            state[name] = before.get(name, value)
        elif name in before:
            value.copy_(before[name])
        else:
            value.zero_()


@dataclass(frozen=True)
class _Captured:
    """A graph, the tensors that it reads and the loss that it writes."""

    images: Tensor
    labels: Tensor
    replay: Callable[[], None]
    loss: Tensor


class _GraphedStep:
    """A step as graphs, one for each kind of input."""

    def __init__(self, step: _Step) -> None:
        self.step = step
        self.recorder = graph_recorder.Recorder(step.device)
        self.graphs: dict[object, _Captured] = {}
        self.settings = _settings(step)
        self.state = step.optimizer.state
        self.memory = self._memory()

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self._check_unchanged()
        captured = self.prepare(images, labels)
        captured.images.copy_(images, non_blocking=True)
        captured.labels.copy_(labels, non_blocking=True)
        captured.replay()
        # The next replay overwrites it, and that of another graph may.
        return captured.loss.clone()

    def prepare(self, images: Tensor, labels: Tensor) -> _Captured:
        """The graph for inputs of these shapes and dtypes, captured unless it is there."""
        kinds = ((tensor.shape, tensor.dtype) for tensor in (images, labels))
        key = (self.step.model.training, *kinds)
        if key not in self.graphs:
            self.graphs[key] = self._captured(images, labels)
        return self.graphs[key]

    def _captured(self, images: Tensor, labels: Tensor) -> _Captured:
        images, labels = (
            tensor.detach().to(self.step.device, copy=True) for tensor in (images, labels)
        )
        step = partial(self.step, images, labels)
        with _restoring(self.step), warnings.catch_warnings():
            # Optimisers warn of being capturable and not captured.
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            for _ in range(graph_recorder.WARM_UP - 1):
                self.recorder.run(step)
            before = _settings(self.step) | _states(self.step)
            try:
                self.recorder.rehearse(step)
                self._check_is_in_place(before)
                replay, loss = self.recorder.capture(step)
            except RuntimeError as error:
                raise RuntimeError(
                    "the step cannot be captured in a CUDA graph: something in the model, the "
                    "loss, the optimizer or a hook may wait for the GPU (.item(), .cpu(), printing "
                    "a tensor, a learning rate that is a tensor without fused=True)"
                ) from error
        self._check_unchanged()
        return _Captured(images, labels, replay, loss)

    def _check_is_in_place(self, before: dict[str, object]) -> None:
        """Raise ValueError if a step changed what a graph would not.

        before: settings and states as they were before that step.
        """
        pairs = zip(self.step.buffers, self.step.current_buffers(), strict=True)
        if any(known is not current for known, current in pairs):
            raise ValueError(
                "model cannot be captured: a module puts a new tensor in the place of a buffer in "
                "every step; it must change the buffer itself (copy_, add_, lerp_)"
            )
        for name, value in (_settings(self.step) | _states(self.step)).items():
            if name not in before or _changed(before[name], value):
                raise ValueError(
                    f"optimizer cannot be captured: {type(self.step.optimizer).__name__} counts on "
                    f"the host, or makes new tensors in every step ({name})"
                )

    def _memory(self) -> list[int]:
        return [tensor.data_ptr() for tensor in (*self.step.parameters, *self.step.buffers)]

    def _check_unchanged(self) -> None:
        """Raise RuntimeError if something was changed that graphs do not see."""
        if self.step.optimizer.state is not self.state:
            raise RuntimeError(
                "the optimizer's state was replaced (load_state_dict) after the step was captured: "
                "call graphed_step again"
            )
        now = _settings(self.step)
        for name, value in self.settings.items():
            if name not in now or _changed(value, now[name]):
                raise RuntimeError(
                    f"the optimizer's {name} was {value} when the step was captured, and a CUDA "
                    f"graph does not see that it is {now.get(name)} now: let it be a tensor on the "
                    f"GPU from the beginning, as lr=torch.tensor(0.1, device='cuda') with "
                    "fused=True, and change that, or call graphed_step again"
                )
        if self._memory() != self.memory:
            raise RuntimeError(
                "a parameter or buffer was moved to other memory after the step was captured: "
                "call graphed_step again"
            )
