"""In-place update of the running statistics of an inverted bottleneck's norms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from moat_kernels.ops.common.batch_norm import (
    RunningUpdate,
    apply_update,
    plan_update,
    update_norm,
)
from moat_kernels.ops.common.spatial import output_size, resolve_padding
from moat_kernels.ops.mbconv.description import NORMS, MBConvDescription, MBConvParameters


def values_per_channel(
    name: str, x: Tensor, parameters: MBConvParameters, description: MBConvDescription
) -> int:
    """How many values per channel the norm called `name` sees: B*H*W before or after the stride."""
    batch, _, height, width = x.shape
    before_stride = {"pre_norm"}
    if description.order == "expand_first":
        before_stride.add("expand_norm")
    if name in before_stride:
        return batch * height * width
    kernel_height, kernel_width = parameters.depthwise_weight.shape[2:]
    stride = description.stride
    top, bottom, left, right = resolve_padding(
        description.padding, height, width, (kernel_height, kernel_width), stride
    )
    out_height = output_size(height, top, bottom, kernel_height, stride)
    return batch * out_height * output_size(width, left, right, kernel_width, stride)


def count_values(
    x: Tensor, parameters: MBConvParameters, description: MBConvDescription
) -> dict[str, int]:
    """By the name of each norm that measures its batch: `values_per_channel`."""
    return {
        name: values_per_channel(name, x, parameters, description)
        for name in NORMS
        if (norm := getattr(description, name)) is not None and not norm.frozen
    }


# The tensors of a norm that a batch changes.
_UPDATED = ("running_mean", "running_var", "num_batches_tracked")


def list_updated(
    parameters: MBConvParameters, names: Iterable[str]
) -> tuple[list[Tensor], list[int]]:
    """(what a batch changes of these norms, which tensor of which norm each is, as a number)."""
    found = {
        len(_UPDATED) * NORMS.index(name) + place: tensor
        for name in names
        for place, part in enumerate(_UPDATED)
        if (tensor := getattr(getattr(parameters, name), part)) is not None
    }
    return list(found.values()), list(found)


def with_updated(
    parameters: MBConvParameters, tensors: Sequence[Tensor], places: Sequence[int]
) -> MBConvParameters:
    """The parameters with what `list_updated` gave in its place."""
    norms: dict[str, dict[str, Tensor]] = {}
    for tensor, place in zip(tensors, places, strict=True):
        norm, part = divmod(place, len(_UPDATED))
        norms.setdefault(NORMS[norm], {})[_UPDATED[part]] = tensor
    changed = {name: getattr(parameters, name)._replace(**one) for name, one in norms.items()}
    return parameters._replace(**changed)


def plan_updates(
    counts: Mapping[str, int], parameters: MBConvParameters, description: MBConvDescription
) -> dict[str, RunningUpdate]:
    """What is due after a forward pass, by the names of norms that share with no other rank.

    counts: of `count_values`. To be asked once for each forward pass.
    """
    updates = {}
    for name, count in counts.items():
        norm = getattr(description, name)
        if norm.process_group is None:
            update = plan_update(norm, getattr(parameters, name), count)
            if update is not None:
                updates[name] = update
    return updates


def finish_updates(
    parameters: MBConvParameters,
    description: MBConvDescription,
    updates: Mapping[str, RunningUpdate],
    moments: Mapping[str, tuple[Tensor, ...]],
) -> None:
    """Update every norm in `moments` (name -> batch mean, biased variance, count over ranks).

    The others in `updates` were updated by a backend.
    """
    for name, (mean, variance, *joined) in moments.items():
        if joined:
            norm, tensors = getattr(description, name), getattr(parameters, name)
            update_norm(norm, tensors, mean, variance, joined[0])
        elif name in updates:
            apply_update(updates[name], mean, variance)
    made = [update.tensors for name, update in updates.items() if name not in moments]
    if made:
        # As every operator of PyTorch does that changes a tensor.
        tensors = (tensor for each in made for tensor in each if tensor is not None)
        changed = [tensor for tensor in tensors if not tensor.is_inference()]
        torch.autograd.graph.increment_version(changed)
