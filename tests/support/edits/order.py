"""Modes of parts, copies, and `fuse` and `unfuse` at any time."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from random import Random

import torch
from torch import nn

import moat_kernels as mk
from moat_kernels import reference
from moat_kernels.drop_path import DropPath
from support.edited_pairs import Pair
from support.edits.making import (
    BatchNorm,
    Edit,
    at,
    find,
)
from support.edits.tensors import offload


def part_in_another_mode(rng: Random, root: nn.Module) -> Edit | None:
    path, _ = find(rng, root, BatchNorm, DropPath, reference.MBConvBlock, reference.Attention)
    mode = rng.random() < 0.3

    def settle(root: nn.Module) -> None:
        root.get_submodule(path).train(mode)

    text = f"{path or 'itself'} always in {'train' if mode else 'eval'}"
    return Edit(text, lambda pair: None, settle)


def copied(rng: Random, root: nn.Module) -> Edit | None:
    def apply(pair: Pair) -> None:
        try:
            plain = copy.deepcopy(pair.plain)
        except Exception:  # neither can be copied
            return
        pair.plain, pair.fused = plain, copy.deepcopy(pair.fused)

    return Edit("deepcopy", apply)


def pickled(rng: Random, root: nn.Module) -> Edit | None:
    def apply(pair: Pair) -> None:
        try:
            plain = pickle.loads(pickle.dumps(pair.plain))
        except Exception:  # closures cannot be pickled, of neither
            return
        pair.plain, pair.fused = plain, pickle.loads(pickle.dumps(pair.fused))

    return Edit("pickle", apply)


def fused_again(rng: Random, root: nn.Module) -> Edit | None:
    recompute = rng.choice(["auto", "none", "expand", "block"])
    return Edit(f"fuse({recompute!r})", lambda pair: mk.fuse(pair.fused, recompute))


def unfused(rng: Random, root: nn.Module) -> Edit | None:
    def apply(pair: Pair) -> None:
        try:
            mk.unfuse(pair.fused)
        except RuntimeError as error:
            if "after it was fused" not in str(error):
                raise

    return Edit("unfuse", apply)


def converted(rng: Random, root: nn.Module) -> Edit | None:
    changes: dict[str, Callable[[nn.Module], object]] = {
        "to(channels_last)": lambda m: m.to(memory_format=torch.channels_last),
        "convert_sync_batchnorm": mk.convert_sync_batchnorm,
        "double().float()": lambda m: m.double().float(),
        "state_dict loaded": lambda m: m.load_state_dict(
            {name: value + 0.01 for name, value in m.state_dict().items()}
        ),
        "share_memory": lambda m: m.share_memory(),
        "all weights on the meta device but in calls": lambda m: [
            offload(inner) for inner in m.modules() if inner._parameters
        ],
        "apply(nn.init)": lambda m: m.apply(
            lambda inner: (
                nn.init.constant_(inner.bias, 0.25)
                if isinstance(inner, nn.Conv2d) and inner.bias is not None
                else None
            )
        ),
    }
    text = rng.choice(list(changes))
    return at("", text, changes[text])
