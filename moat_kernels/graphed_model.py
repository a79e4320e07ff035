"""Models whose calls are CUDA graphs, in whatever training loop or server calls them."""

from __future__ import annotations

import copyreg
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_unflatten

from moat_kernels import graph_recorder
from moat_kernels.drop_path import saves_by_hooks
from moat_kernels.graphed_calls import GraphedCall, Kind, Turn
from moat_kernels.inspection import has_hooks, hooks_for_all_modules
from moat_kernels.normalization import SyncBatchNorm
from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.common.backends import is_eager, warn_once

Model = TypeVar("Model", bound=nn.Module)

# Kinds of calls that are captured of a model; each keeps memory of its own for its inputs, results
# and gradients.
MOST_GRAPHS = 16

_TENSORS = (nn.Parameter, Tensor)


def graphed_model(model: Model) -> Model:
    """Let `model` launch its calls as CUDA graphs: `model(images)` and its backward pass, one each.

    For training loops and servers as they are: losses, optimisers, schedulers, clipping, several
    backward passes for one step, GradScaler, DistributedDataParallel around it. Where all is on a
    CPU nothing changes. (`graphed_step` has the optimiser in its graph too, and no loop.)

    Changes the class of the model in place, to a subclass, and returns the model. Parameters,
    buffers and their names stay, as does `state_dict`; copies and pickles are of the old class.

    The first call of each kind (shapes, strides and dtypes of the inputs; training or eval; with
    gradients or without; autocast; what requires gradients) is captured, which takes as long as
    some calls, and leaves buffers and random numbers as they were. All graphs with gradients share
    their memory, and all without. Drop path and dropout draw anew in every call. Results and
    gradients are new tensors.

    Parameters and buffers may be changed in place (an optimiser, `load_state_dict`); where they are
    moved to other memory (`to`), calls are captured anew. Hooks of the model itself and of its
    parameters run. All else that Python decides is as it was at the capture: numbers that modules
    hold, environment variables. Of two threads only one may call the model at a time.

    Calls run as they are, with a FallbackWarning that names the reason, where something inside has
    hooks, which a graph would not call, or synchronises ranks, where tensors are of another class
    (DTensor) or on several devices, in DataParallel, and after MOST_GRAPHS kinds; and without one
    under torch.compile, in exports and under activation checkpointing.

    >>> model = graphed_model(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.GELU()))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> model(torch.randn(8, 3)).square().mean().backward()
    >>> optimizer.step()

    Raises TypeError if `model` is no module, ValueError if it is wrapped in DistributedDataParallel
    (wrap the graphed model) or has a forward of its own (torch.compile). A call raises RuntimeError
    where it cannot be captured, as something in it waits for the GPU, and ValueError where it
    returns something else than tensors, lists, tuples and dictionaries of them. A backward pass
    raises RuntimeError if the model was called with gradients since, or for a second time: a graph
    keeps what one call saved.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "model must not be wrapped in DistributedDataParallel: "
            "DistributedDataParallel(graphed_model(model))"
        )
    if "forward" in model.__dict__:
        raise ValueError(
            f"model must run the forward of its class, and this {type(model).__name__} has one of "
            "its own, as torch.compile and others set it"
        )
    if not isinstance(model, GraphedModule):
        _set_class(model, _graphed_class(type(model)))
    return model


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


class GraphedModule(nn.Module):
    """What every class that `graphed_model` makes has; `plain_class` is what it was made of."""

    plain_class: type[nn.Module]

    def forward(self, *inputs: Any, **options: Any) -> Any:
        graphs = _graphs.get(self)
        if graphs is None:
            graphs = _graphs[self] = _Graphs()
        return graphs.call(self, inputs, options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As of the plain class: graphs are of this model's memory."""
        reduced: Any = super().__reduce_ex__(max(2, int(protocol)))
        function, arguments, *state = reduced
        if function is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return (function, arguments, *state)  # the plain class has its own way of pickling
        return (_rebuild, (self.plain_class, *arguments[1:]), *state)

    def __prepare_scriptable__(self) -> NoReturn:
        """torch.jit.script asks for what to script."""
        raise RuntimeError(
            f"{type(self).__name__} does not become TorchScript; a copy.deepcopy of it is plain"
        )


def _rebuild(plain: type[nn.Module], *arguments: Any) -> nn.Module:
    return plain.__new__(plain, *arguments)


def plain_class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the one that it had before `graphed_model`."""
    return module.plain_class if isinstance(module, GraphedModule) else type(module)


def refuse_graphed(model: nn.Module) -> None:
    """Raise ValueError where a model that is to be captured launches graphs already."""
    for name, module in model.named_modules():
        if isinstance(module, GraphedModule):
            which = f"its {name} was" if name else "it was"
            raise ValueError(f"model must not be graphed: {which} given to graphed_model")


_classes: dict[type, type[GraphedModule]] = {}


def _graphed_class(plain: type[nn.Module]) -> type[GraphedModule]:
    if plain not in _classes:
        metaclass: Any = type(plain)
        attributes = {"plain_class": plain, "__module__": __name__, "__doc__": plain.__doc__}
        _classes[plain] = metaclass(f"Graphed{plain.__name__}", (GraphedModule, plain), attributes)
    return _classes[plain]


class _Look(NamedTuple):
    """What is seen of a model in every call.

    modes: all that may change what a call launches. memory: where its tensors lie.
    obstacle: why it cannot be captured; empty: nothing of it.
    """

    modes: tuple[bool, ...]
    memory: list[int]
    obstacle: str


def _look_at(model: nn.Module) -> _Look:
    modes: list[bool] = []
    memory: list[int] = []
    obstacle = "hooks for all modules are registered" if hooks_for_all_modules() else ""
    if "_is_replica" in model.__dict__:
        obstacle = "it is one of DataParallel's replicas, which are made in every call"
    seen, left = {id(model)}, [model]
    while left:
        module = left.pop()
        modes.append(module.training)
        if module is not model and has_hooks(module):
            obstacle = f"a {type(module).__name__} inside has hooks"
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is None:
                    continue
                if type(tensor) not in _TENSORS:
                    return _Look((), [], f"a {type(tensor).__name__} among its tensors")
                modes.append(tensor.requires_grad)
                memory.append(tensor.data_ptr())
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                left.append(child)
    return _Look(tuple(modes), memory, obstacle)


class _Graphs:
    """The graphs of one model, or by the kind of call why there is none."""

    def __init__(self) -> None:
        self.memory: list[int] = []
        self.calls: dict[Hashable, GraphedCall | str] = {}
        self.captures = 0
        self.recorders: dict[bool, graph_recorder.Recorder] = {}
        self.turn = Turn()

    def call(self, model: GraphedModule, inputs: Sequence[Any], options: dict[str, Any]) -> Any:
        leaves, structure = tree_flatten((inputs, options))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not _may_be_captured(tensors):
            return model.plain_class.forward(model, *inputs, **options)
        look = _look_at(model)
        found = look.obstacle or self._find(model, leaves, structure, tensors, look)
        if isinstance(found, GraphedCall):
            return found(tensors, self.turn)
        if found:
            warn_once(f"{model.plain_class.__name__}: {found}; running without a CUDA graph")
        return model.plain_class.forward(model, *inputs, **options)

    def _find(
        self,
        model: GraphedModule,
        leaves: Sequence[Any],
        structure: Any,
        tensors: Sequence[Tensor],
        look: _Look,
    ) -> GraphedCall | str:
        """The call's graphs, captured unless they are there; or why there are none."""
        if look.memory != self.memory:
            self.memory, self.calls, self.recorders = look.memory, {}, {}
        kind = _kind(model, tensors)
        constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        layouts = tuple((x.shape, x.stride(), x.dtype, x.requires_grad) for x in tensors)
        if not _is_hashable(constants):
            return "an argument of its call has no hash"
        key = (str(structure), constants, layouts, kind, look.modes)
        if key not in self.calls:
            self.calls[key] = self._capture(model, leaves, structure, tensors, kind)
        return self.calls[key]

    def _capture(
        self,
        model: GraphedModule,
        leaves: Sequence[Any],
        structure: Any,
        tensors: Sequence[Tensor],
        kind: Kind,
    ) -> GraphedCall | str:
        owned, buffers = [*model.parameters(), *model.buffers()], list(model.buffers())
        devices = {x.device for x in (*owned, *tensors)}
        if len(devices) > 1:
            return "tensors on several devices"
        if _synchronises(model.modules()):
            return "norms that are synchronised"
        if self.captures == MOST_GRAPHS:
            return f"it was captured {MOST_GRAPHS} times before"
        self.captures += 1
        (device,) = devices
        if kind.trains not in self.recorders:
            self.recorders[kind.trains] = graph_recorder.Recorder(device)

        def function(*given: Tensor) -> Any:
            remaining = iter(given)
            placed = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            inputs, options = tree_unflatten(placed, structure)
            return model.plain_class.forward(model, *inputs, **options)

        with graph_recorder.restoring(buffers, device):
            call = GraphedCall(self.recorders[kind.trains], function, tensors, owned, kind)
        if any(one is not other for one, other in zip(buffers, model.buffers(), strict=True)):
            raise ValueError(
                "model cannot be captured: a module puts a new tensor in the place of a buffer in "
                "every call; it must change the buffer itself (copy_, add_, lerp_)"
            )
        return call


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


_graphs: WeakKeyDictionary[nn.Module, _Graphs] = WeakKeyDictionary()


def _may_be_captured(tensors: Sequence[Tensor]) -> bool:
    """Whether a graph would be of use, and nobody looks at what happens inside."""
    if not tensors or any(type(x) not in _TENSORS for x in tensors) or not is_eager():
        return False
    if tensors[0].device.type not in graph_recorder.CAPTURED or is_in_torch_dispatch_mode():
        return False
    captured = tensors[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return not captured and not saves_by_hooks()


def _kind(model: nn.Module, tensors: Sequence[Tensor]) -> Kind:
    trains = torch.is_grad_enabled() and any(
        x.requires_grad for x in (*tensors, *model.parameters())
    )
    return Kind(trains, torch.is_inference_mode_enabled(), autocast_dtype(tensors[0]))


def _synchronises(modules: Iterable[nn.Module]) -> bool:
    """Whether norms average over ranks, which a graph would do with those of its capture."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return any(isinstance(module, nn.SyncBatchNorm | SyncBatchNorm) for module in modules)
