"""A module's calls captured in CUDA graphs: forward alone, or forward and backward.

Autograd sees a captured call as one function of the parameters: gradients go through hooks of
parameters, into `.grad` and to whoever averages them, as those of a call that runs as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from moat_kernels import graph_recorder

# Bytes that the gradient of each parameter begins at a multiple of, in memory that they share.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Kind:
    """What a graph is captured for, beside the inputs.

    trains: whether gradients are wanted. infers: whether it is inference mode.
    autocast_dtype: of autocast; None: it is off.
    """

    trains: bool
    infers: bool
    autocast_dtype: torch.dtype | None


class GraphedCall:
    """A call as one or two graphs.

    function: of the inputs, which it must use where they lie. sources: the parameters, and what
        else of the module's tensors may need a gradient.
    """

    def __init__(
        self,
        recorder: graph_recorder.Recorder,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        sources: Sequence[Tensor],
        kind: Kind,
    ) -> None:
        self.inputs = [_like(x, kind.trains) for x in inputs]
        call = _Call(partial(function, *self.inputs), recorder.device, kind)
        wanted = [x for x in (*self.inputs, *sources) if kind.trains and x.requires_grad]
        self._record(recorder, call, wanted)
        self.grad_outputs, self.structure = call.grad_outputs, call.structure
        self.is_differentiable = call.is_differentiable
        # What has a gradient: the inputs by number, and the other tensors themselves.
        self._differentiated: list[int | Tensor] = [
            next((number for number, x in enumerate(self.inputs) if x is tensor), tensor)
            for tensor in self._gradients.sources
        ]

    def _record(
        self, recorder: graph_recorder.Recorder, call: _Call, wanted: Sequence[Tensor]
    ) -> None:
        warm_up = partial(call.both, wanted)
        for _ in range(graph_recorder.WARM_UP - 1):
            recorder.run(warm_up)
        self.replay_backward: Callable[[], None] | None = None
        try:
            recorder.rehearse(warm_up)
            self._gradients = _Gradients(wanted, call.has_gradient)
            self.replay_forward, self.outputs = recorder.capture(call.forward)
            if self._gradients.sources:
                backward = partial(call.backward_into, self._gradients)
                self.replay_backward, _ = recorder.capture(backward)
        except RuntimeError as error:
            raise RuntimeError(
                "the model cannot be captured in a CUDA graph: something in it may wait for the "
                "GPU (.item(), .cpu(), printing a tensor)"
            ) from error

    def __call__(self, inputs: Sequence[Tensor], turn: Turn) -> Any:
        """The result in new tensors. turn: the last that any graph in the same memory took."""
        with torch.no_grad():
            for kept, x in zip(self.inputs, inputs, strict=True):
                kept.copy_(x, non_blocking=True)
        self.replay_forward()
        if self.replay_backward is None:
            results: Sequence[Any] = _copies(self.outputs)
        else:
            turn.next()
            sources = [
                inputs[each] if isinstance(each, int) else each for each in self._differentiated
            ]
            results = _Replayed.apply(self, turn, *sources)
        return tree_unflatten(results, self.structure)

    def gradients(self) -> list[Tensor]:
        return self._gradients.copies()


class Turn:
    """Which call used the memory last that several graphs share."""

    def __init__(self) -> None:
        self.number = 0

    def next(self) -> None:
        self.number += 1


class _Replayed(torch.autograd.Function):
    """The forward graph was replayed; the backward one is when gradients come."""

    @staticmethod
    def forward(ctx: Any, call: GraphedCall, turn: Turn, *_: Tensor) -> tuple[Any, ...]:
        ctx.call, ctx.turn, ctx.number = call, turn, turn.number
        results = _copies(call.outputs)
        constant = [
            x
            for x, has_gradient in zip(results, call.is_differentiable, strict=True)
            if isinstance(x, Tensor) and not has_gradient
        ]
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, turn = ctx.call, ctx.turn
        if ctx.number != turn.number:
            raise RuntimeError(
                "this backward pass comes too late: the model was called again since, or has been "
                "through it already, and a CUDA graph keeps what one call saved; call backward "
                "after each call of the model"
            )
        turn.next()
        given = (grad for grad, has in zip(grads, call.is_differentiable, strict=True) if has)
        for kept, grad in zip(call.grad_outputs, given, strict=True):
            kept.zero_() if grad is None else kept.copy_(grad)
        call.replay_backward()
        return (None, None, *call.gradients())


class _Call:
    """The call as it is, in the state that its graphs are captured in."""

    def __init__(self, function: Callable[[], Any], device: torch.device, kind: Kind) -> None:
        self.function, self.device, self.kind = function, device, kind
        self.differentiable: list[Tensor] = []
        self.grad_outputs: list[Tensor] = []

    def forward(self) -> list[Any]:
        """Its results, tensors without their history."""
        autocast = graph_recorder.autocast_for_capture(self.device, self.kind.autocast_dtype)
        with torch.set_grad_enabled(self.kind.trains), autocast:
            leaves, self.structure = tree_flatten(self.function())
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, int, float, str, type(None))):
                raise ValueError(
                    "a graphed model must return tensors, or lists, tuples and dictionaries of "
                    f"them, and returns a {type(leaf).__name__}"
                )
        self.is_differentiable = [isinstance(x, Tensor) and x.requires_grad for x in leaves]
        self.differentiable = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        return [x.detach() if isinstance(x, Tensor) else x for x in leaves]

    def backward(self, wanted: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        outputs, self.differentiable = self.differentiable, []
        with _without_hooks(wanted):
            return torch.autograd.grad(outputs, wanted, self.grad_outputs, allow_unused=True)

    def both(self, wanted: Sequence[Tensor]) -> None:
        """Once, to warm up: what is there for the backward pass is made here."""
        self.forward()
        if not self.grad_outputs:
            self.grad_outputs = [torch.zeros_like(x) for x in self.differentiable]
        self.has_gradient = [False] * len(wanted)
        if self.differentiable:
            self.has_gradient = [gradient is not None for gradient in self.backward(wanted)]

    def backward_into(self, gradients: _Gradients) -> None:
        found = self.backward(gradients.sources)
        torch._foreach_copy_(gradients.views, [x for x in found if x is not None])


class _Gradients:
    """Memory that the backward graph writes gradients to, of each dtype one piece.

    Whoever gets them may keep them (`.grad` does), so they are copied in as many launches.
    """

    def __init__(self, wanted: Sequence[Tensor], has_gradient: Sequence[bool]) -> None:
        self.sources = [x for x, has in zip(wanted, has_gradient, strict=True) if has]
        self._places: list[tuple[torch.dtype, int]] = []
        sizes: dict[torch.dtype, int] = {}
        for x in self.sources:
            begin = sizes.get(x.dtype, 0)
            self._places.append((x.dtype, begin))
            unit = max(_ALIGNMENT // x.element_size(), 1)
            sizes[x.dtype] = begin + -(-x.numel() // unit) * unit
        device = self.sources[0].device if self.sources else None
        self._pieces = {
            dtype: torch.empty(size, dtype=dtype, device=device) for dtype, size in sizes.items()
        }
        self._layouts = [(x.shape, _dense_stride(x)) for x in self.sources]
        self.views = list(self._views_of(self._pieces))

    def _views_of(self, pieces: dict[torch.dtype, Tensor]) -> Iterator[Tensor]:
        for (dtype, begin), (size, stride) in zip(self._places, self._layouts, strict=True):
            yield pieces[dtype].as_strided(size, stride, begin)

    def copies(self) -> list[Tensor]:
        return list(self._views_of({dtype: x.clone() for dtype, x in self._pieces.items()}))


def _dense_stride(x: Tensor) -> tuple[int, ...]:
    """x's stride, or where there are gaps in its memory that of one without."""
    return torch.empty_like(x, device="meta").stride()


@contextlib.contextmanager
def _without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Hooks of tensors see the gradients that leave a graph, not those in it as well."""
    hooks = [tensor._backward_hooks for tensor in tensors]
    try:
        for tensor in tensors:
            tensor._backward_hooks = None
        yield
    finally:
        for tensor, own in zip(tensors, hooks, strict=True):
            tensor._backward_hooks = own


def _like(x: Tensor, trains: bool) -> Tensor:
    """A copy for graphs to read from."""
    kept = torch.empty_like(x, requires_grad=False)
    with torch.no_grad():
        kept.copy_(x)
    return kept.requires_grad_(trains and x.requires_grad)


def _copies(results: Sequence[Any]) -> list[Any]:
    """The next replay overwrites them, and that of another graph may."""
    return [x.clone() if isinstance(x, Tensor) else x for x in results]
