"""torch.fx's symbolic tracing (`create_feature_extractor`): a fused module is one node, a call."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy


def is_traced(x: Any) -> bool:
    """Whether an input stands for a value of a graph that is being recorded."""
    return isinstance(x, Proxy)


def record_call(module: nn.Module, *inputs: Any, **options: Any) -> Any:
    """The node that calls `module`, as torch.fx records a module of torch.nn."""
    tracer = next(value.tracer for value in inputs if is_traced(value))
    return tracer.create_proxy("call_module", tracer.path_of_module(module), inputs, options)


def call_as_node(module: nn.Module, x: Any) -> Any:
    """module(x) as one node, of a module whose code asks for sizes, which a graph does not know."""
    return x.tracer.call_module(module, lambda x: record_call(module, x), (x,), {})
