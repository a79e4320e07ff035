"""Whatever a user edits, in whichever order: the fused module computes what the plain one does.

One to three edits of `support.edits` are drawn for each seed and made alike to a plain and a fused
module with the same weights; `support.edited_pairs` compares them. 300 seeds by default; others by
environment variables:

    MOAT_KERNELS_EDITS=3000 pytest tests/semantics/test_random_edits.py      # seeds 0 .. 2999
    MOAT_KERNELS_EDITS=5000:5100 pytest tests/semantics/test_random_edits.py # 5000 .. 5099

A failure names the seed, the edits and the fewest of them that fail too.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from itertools import combinations
from random import Random

import pytest
import torch
from support.edited_pairs import (
    FROZEN,
    MODES,
    SUBJECTS,
    Pair,
    Raised,
    difference,
    make_input,
    make_pair,
    observe,
    observe_frozen,
    outputs_only,
)
from support.edits import DRAWS, Edit, Impossible
from torch import nn

import moat_kernels as mk

WEIGHTS = {name: 1 if name in ("model", "backbone") else 4 for name in SUBJECTS}
WAYS = {"built": 4, "fuse": 2, "fused last": 2}
# One seed of so many is compiled by torch.compile(backend="eager"), which takes
# seconds for each mode: it runs in the first one alone.
COMPILED = 300
TOGETHER = 10  # seeds in one test: preparing a test takes as long as trying a seed


def seeds() -> range:
    first, _, last = os.environ.get("MOAT_KERNELS_EDITS", "300").rpartition(":")
    return range(int(first or 0), int(last))


@dataclass(frozen=True)
class Scenario:
    """What a seed stands for. order: of the modes."""

    seed: int
    subject: str
    dtype: torch.dtype
    way: str
    channels_last: bool
    input_gradient: bool
    compiled: bool
    order: tuple[str, ...]
    edits: tuple[Edit, ...]

    def __str__(self) -> str:
        edits = "; ".join(edit.text for edit in self.edits)
        order = ", ".join(self.order)
        way = f"{self.way}{', compiled' if self.compiled else ''}"
        return f"seed {self.seed}: {self.subject}, {self.dtype}, {way} ({order}): {edits}"


def choose(rng: Random, weights: dict) -> object:
    return rng.choices(list(weights), list(weights.values()))[0]


def draw(seed: int) -> Scenario:
    rng = Random(seed)
    subject, way = choose(rng, WEIGHTS), choose(rng, WAYS)
    dtype = torch.float64 if rng.random() < 0.3 else torch.float32
    order = tuple(rng.sample([*MODES, FROZEN], 4))
    channels_last = subject != "attention" and rng.random() < 0.5
    input_gradient = rng.random() < 0.8
    # Drawn of a plain module that is edited on the way, so that an edit can build on another.
    pair = make_pair(subject, dtype, "plain")
    edits: list[Edit] = []
    wanted = rng.choice([1, 1, 2, 2, 3])
    while len(edits) < wanted:
        edit = choose(rng, DRAWS)(rng, pair.plain)
        if edit is None:
            continue
        try:
            edit.apply(pair)
        except Impossible:
            pair = make_pair(subject, dtype, "plain")
            for earlier in edits:
                earlier.apply(pair)
            continue
        edits.append(edit)
    compiled = seed % COMPILED == 43 and subject not in ("model", "backbone")
    if compiled:
        order = tuple(mode for mode in order if mode != FROZEN)[:1]
    return Scenario(
        *(seed, subject, dtype, way, channels_last, input_gradient, compiled, order, tuple(edits))
    )


def edited(scenario: Scenario, edits: tuple[Edit, ...], way: str) -> Pair:
    pair = make_pair(scenario.subject, scenario.dtype, "plain" if way == "fused last" else way)
    for edit in edits:
        edit.apply(pair)
    if way == "fused last":
        mk.fuse(pair.fused)
    return pair


def compare(scenario: Scenario, edits: tuple[Edit, ...], way: str) -> tuple[str, bool]:
    """(what differs, whether the plain module ran)."""
    try:
        pair = edited(scenario, edits, way)
    except Impossible:
        return "", False
    except Exception as error:
        return f"the edit itself raises {error!r}", True

    def settle(module: nn.Module) -> None:
        for edit in edits:
            if edit.settle is not None:
                edit.settle(module)

    if scenario.compiled:
        torch.compiler.reset()
        for module in (pair.plain, pair.fused):  # what PyTorch gets wrong, it does in both
            module.compile(backend="eager")
    x = make_input(scenario.subject, scenario.dtype)
    if scenario.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    ran = False
    for mode in scenario.order:
        frozen = observe_frozen(pair.fused, x, settle) if mode == FROZEN else None
        if mode == FROZEN and frozen is None:
            continue
        # After a frozen copy the module itself, so that statistics move in both of the pair.
        mode = "no_grad" if mode == FROZEN else mode
        arguments = x, mode, settle, scenario.input_gradient
        expected = observe(pair.plain, *arguments)
        found = difference(observe(pair.fused, *arguments), expected)
        if not found and frozen is not None:
            found = difference(frozen, outputs_only(expected))
            mode = FROZEN
        if found:
            return f"{mode}: {found}", True
        if isinstance(expected, Raised):
            break  # statistics may have moved in one of them before it raised
        ran = True
    return "", ran


def fewest(scenario: Scenario) -> str:
    """The fewest of the edits that differ too."""
    for count in range(1, len(scenario.edits)):
        for edits in combinations(scenario.edits, count):
            try:
                found, _ = compare(scenario, edits, scenario.way)
            except Exception:
                continue  # an edit that needs another
            if found:
                return f"already {'; '.join(edit.text for edit in edits)}: {found}"
    return "no fewer"


@pytest.mark.parametrize("first", seeds()[::TOGETHER])
def test_edited_alike(first: int) -> None:
    failures = []
    for seed in range(first, min(first + TOGETHER, seeds().stop)):
        scenario = draw(seed)
        found, _ = compare(scenario, scenario.edits, scenario.way)
        if found:
            failures.append(f"{scenario}\n{found}\n{fewest(scenario)}")
    assert not failures, "\n\n".join(failures)


def test_plain_against_plain() -> None:
    """The comparison itself finds nothing where there is nothing, and most edited modules run."""
    ran = 0
    for seed in range(60):
        scenario = draw(seed)
        edits = tuple(edit for edit in scenario.edits if "fuse" not in edit.text)
        found, runs = compare(dataclasses.replace(scenario, compiled=False), edits, "plain")
        assert not found, f"{scenario}\n{found}"
        ran += runs
    assert ran > 45


def test_ignored_edits_are_found() -> None:
    """An edited module against an untouched one."""
    found = 0
    for seed in range(60):
        scenario = draw(seed)
        plain = edited(scenario, scenario.edits, "plain").plain
        untouched = make_pair(scenario.subject, scenario.dtype, "plain").plain
        x = make_input(scenario.subject, scenario.dtype)
        found += bool(difference(observe(untouched, x, "train"), observe(plain, x, "train")))
    assert found > 40
