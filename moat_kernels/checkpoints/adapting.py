"""What a checkpoint has that a model of another configuration lacks, or has in another form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from moat_kernels.configuration import (
    ConfigurationError,
    adaptations,
    turned,
    turns_channels,
)

from .errors import CheckpointError
from .filling import HEAD_PREFIXES
from .report import CheckpointReport
from .state_dicts import StateDict

_FIRST_CONVOLUTION = "stem.conv_0.weight"
_STAGE_PREFIX = "stages."
_CLASSIFIER_PREFIX = "logits_head."
_RGB = 3


def adapt(
    state_dict: StateDict,
    report: CheckpointReport,
    target: StateDict,
    configurations: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None],
    fine_tune: bool = False,
) -> StateDict:
    """The part of ``state_dict`` that the model with the tensors ``target`` has, in its form.

    Args:
        report: gets a line for all that is left out or changed.
        configurations: of the checkpoint and of the model, as far as they are known.
        fine_tune: the checkpoint is a start for training, see ``load_checkpoint``.

    Raises:
        CheckpointError: the checkpoint is for a model that computes something else.
    """
    found, own = configurations
    if found is not None and own is not None:
        try:
            report.adapted += adaptations(found, own, fine_tune)
        except ConfigurationError as error:
            raise CheckpointError(str(error)) from error
    adapted = dict(state_dict)
    if not any(name.startswith(HEAD_PREFIXES) for name in target):
        _leave_out(
            *(adapted, report, lambda name: name.startswith(HEAD_PREFIXES)),
            "the model has no classifier head",
        )
    if own is not None:  # the model is a MOAT, which may end early
        stages = {_stage_of(name) for name in (*target, _FIRST_CONVOLUTION)}
        _leave_out(
            *(adapted, report, lambda name: _stage_of(name) not in stages),
            "the model has no such stage (out_indices)",
        )
    first = adapted.get(_FIRST_CONVOLUTION)
    if found and own and first is not None and turns_channels(found, own):
        adapted[_FIRST_CONVOLUTION] = turned(first)  # `adaptations` has told it
    _adapt_first_convolution(adapted, report, target)
    if fine_tune:
        _keep_own_classifier(adapted, report, target)
    return adapted


def _leave_out(
    state_dict: StateDict, report: CheckpointReport, is_left: Callable[[str], bool], reason: str
) -> None:
    for name in [name for name in state_dict if is_left(name)]:
        del state_dict[name], report.source[name]
        report.skipped.update(dict.fromkeys(report.loaded.pop(name), reason))


def _keep_own_classifier(
    state_dict: StateDict, report: CheckpointReport, target: StateDict
) -> None:
    """The model's own values for what the checkpoint has for other classes, or not at all."""
    own = {name: tensor for name, tensor in target.items() if name.startswith(HEAD_PREFIXES)}
    kept = {
        name
        for name, tensor in own.items()
        if name not in state_dict
        or (name.startswith(_CLASSIFIER_PREFIX) and state_dict[name].shape != tensor.shape)
    }
    _leave_out(state_dict, report, lambda name: name in kept, "it is for other classes")
    if kept:
        state_dict.update({name: own[name] for name in kept})
        report.adapted.append(f"the model's own {', '.join(sorted(kept))} stay")


def _stage_of(name: str) -> str | None:
    """The stage that a tensor is in, by its name; None if it is in none."""
    return name.split(".")[1] if name.startswith(_STAGE_PREFIX) else None


def _adapt_first_convolution(
    state_dict: StateDict, report: CheckpointReport, target: StateDict
) -> None:
    """Weights [C, 3, 3, 3] for images of another number of channels."""
    weight, own = state_dict.get(_FIRST_CONVOLUTION), target.get(_FIRST_CONVOLUTION)
    if weight is None or own is None or weight.dim() != 4 or own.dim() != 4:
        return
    channels = own.shape[1]
    if weight.shape[1] == _RGB and channels != _RGB and weight.shape[2:] == own.shape[2:]:
        state_dict[_FIRST_CONVOLUTION] = _for_channels(weight, channels)
        how = "summed" if channels == 1 else f"repeated, times {_RGB}/{channels}"
        report.adapted.append(
            f"{_FIRST_CONVOLUTION} is for RGB, in_chans is {channels}: its channels are {how}"
        )


def _for_channels(weight: Tensor, channels: int) -> Tensor:
    """[C, 3, 3, 3] -> [C, channels, 3, 3], which sees a grey image in all channels the same."""
    if channels == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, math.ceil(channels / _RGB), 1, 1)[:, :channels]
    return repeated * (_RGB / channels)
