"""What `fuse` knows, and what becomes of everything around it, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moat_kernels.adapters.registry import all_adapters

_REFERENCE = '`use_backend("reference")` can'

# What a fused block may be combined with -> what happens; tests/test_fuse_limits.py has each.
COMBINATIONS = {
    "synchronised batch norms, made before or after `fuse`": "fused",
    "norms in eval mode, cumulative, without statistics or weights": "fused",
    "other norms (instance, group, layer norm)": "left as it is, and reported",
    "hooks on a block, parametrized weights": "fused; they run",
    "hooks on modules inside a block, or a forward replaced there": (
        "the block runs unfused, with a `FallbackWarning`; modules around attention are called"
    ),
    "settings and biases changed inside a block": (
        "fused, or, if no op computes them, the block runs unfused, with a `FallbackWarning`"
    ),
    "modules inside replaced later (adapters, quantised ones)": (
        "fused if their classes are known; else the block runs unfused, with a "
        "`FallbackWarning`; those around attention are called"
    ),
    (
        "batch norms of fixed statistics (torchvision's and detectron2's FrozenBatchNorm2d, timm's "
        "FrozenBatchNormAct2d), frozen before or after `fuse`"
    ): "fused",
    "weights that are tensor subclasses (torchao)": (
        "left as it is, and reported; later: the block runs unfused, with a `FallbackWarning`"
    ),
    "hooks for all modules (`register_module_forward_hook`)": (
        "the block runs unfused, with a `FallbackWarning`, except `FlopCounterMode`'s"
    ),
    "torch.fx, `create_feature_extractor`": "a fused module is one node",
    "weights on the meta device": "left as it is, and reported",
    "another class given to a fused block (`fully_shard`)": "fused; `unfuse` raises `RuntimeError`",
    "integer or complex input": "`TypeError` that names it",
    "`torch.func`, `vmap`": f"`RuntimeError`; {_REFERENCE}",
    "derivatives of derivatives": f"`RuntimeError` of autograd; {_REFERENCE}",
    "forward-mode derivatives": f"`NotImplementedError` of autograd; {_REFERENCE}",
    "`torch.jit.script`, `torch.jit.trace`": "`RuntimeError`; `torch.export` works",
}


def supported_cases() -> str:
    """Two Markdown tables: the implementations that `fuse` knows; what may be combined with it."""
    adapters = [
        (
            adapter.implementation,
            f"`{adapter.class_name}`",
            f"`{adapter.op}`",
            adapter.covers,
            adapter.leaves,
        )
        for adapter in all_adapters()
    ]
    implementations = _table(("implementation", "class", "op", "fused", "left as it is"), adapters)
    return f"{implementations}\n\n{_table(('combination', 'what happens'), COMBINATIONS.items())}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line).rstrip() + " |" for line in lines)
