"""The operator library of this package, shared by all ops: `torch.ops.moat_kernels.*`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Implementation = Callable[..., list[Tensor]]

# A fragment: the native extension, where it is built, defines the library itself.
LIBRARY = torch.library.Library("moat_kernels", "FRAGMENT")

# What `define_op` registered, by the operator's name: for modes that look inside the operators.
IMPLEMENTATIONS: dict[str, Implementation] = {}


def define_op(schema: str, implementation: Implementation, fake: Implementation) -> None:
    """Register an op with one implementation for every device and one for fake tensors."""
    name = schema.partition("(")[0]
    IMPLEMENTATIONS[name] = implementation
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moat_kernels::{name}", fake, lib=LIBRARY)


def is_watched() -> bool:
    """Whether something must see the operators: a compiler or a dispatch mode.

    Other calls go straight to the implementation: dispatching to Python takes 0.05 to 0.1 ms.
    """
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
