"""Whoever is bypassed is asked first: every module and every method of fused ones, by reflection.

Whatever a user puts in the place of a method, a class or a hook (`support.patches`), anywhere in a
fused module, has its say: the result is the plain module's with the same patch, in training, in
eval with and without autograd, and of a frozen copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from support.edited_pairs import (
    CLASSES,
    FROZEN,
    SUBJECTS,
    Pair,
    Raised,
    build_pair,
    check_runs_fused,
    difference,
    make_input,
    make_pair,
    observe,
    observe_frozen,
    outputs_only,
)
from support.foreign_models import make_foreign_model
from support.patches import (
    GLOBAL_HOOKS,
    HOOKS,
    METHOD_PATCHES,
    mark,
    on_the_instance,
    overriding,
    patched_class,
    public_methods,
)
from torch import Tensor, nn

import moat_kernels as mk

# Methods that no forward pass calls, of plain modules and of fused ones.
NOT_CALLED = {
    "extra_repr": "text for repr()",
    "reset_classifier": "changes the model, does not compute",
    "get_classifier": "returns a module",
    "no_weight_decay": "names for optimisers",
    "parameter_groups": "groups for optimisers",
    "group_matcher": "groups for optimisers",
    "set_grad_checkpointing": "changes the model, does not compute",
    "prune_intermediate_layers": "changes the model, does not compute",
    "forward_intermediates": "another way in: it calls forward_stages, as forward does",
}
# Methods of fused classes alone: there is no plain result to compare with.
FUSED_ALONE = {
    "frozen_steps": "for freeze",
    "read": "its modules, as the op takes them",
    "read_attention_half": "its modules, as the op takes them",
    "steps_of_stages": "for freeze",
    "steps_of_head": "for freeze",
    "channels": "sizes of maps",
    "strides": "sizes of maps",
}
# Methods of plain blocks that their own forward does not call: to override one changes nothing, and
# must change nothing in a fused block either.
WITHOUT_EFFECT = {"description", "tensors"}

BLOCKS = ("mbconv stride 2", "moat windows", "attention", "stem")
ALIKE = ("mbconv", "moat stride 2")  # of the same parts as the first two
WHOLE = ("model", "backbone")
# Where each kind of patch is tried: in modules made fused, which alone can be frozen, or by `fuse`.
FUSE = ("bound to the instance", "full backward pre-hook", "weights made at the call")
# float32, which the native kernels cover: they bypass the most.
DTYPE = torch.float32
ALL_MODES = (FROZEN, "no_grad", "eval", "train")
FOREIGN = (
    *("timm coatnet", "torchvision maxvit", "vit-pytorch maxvit"),
    *("RooKichenn", "Apple", "changzy00"),
)

Patch = Callable[[nn.Module], object]


def way_of(kind: str) -> str:
    return "fuse" if kind in FUSE else "built"


def modes_of(kind: str) -> tuple[str, ...]:
    return ("eval", "train") if "backward" in kind else ALL_MODES


def pair_of(name: str, way: str) -> Pair:
    return make_pair(name, DTYPE, way)


def modules_of(name: str) -> dict[str, nn.Module]:
    return dict(pair_of(name, "plain").plain.named_modules())


def input_of(name: str) -> Tensor:
    return make_input(name, DTYPE)


def differences(pair: Pair, x: Tensor, modes: tuple[str, ...]) -> dict[str, str]:
    """By mode, where the fused module's results are not the plain module's."""
    found = {}
    if FROZEN in modes and (frozen := observe_frozen(pair.fused, x)) is not None:
        found[FROZEN] = difference(frozen, outputs_only(observe(pair.plain, x, "no_grad")))
        observe(pair.fused, x, "no_grad")  # a norm that measures in eval too keeps step
    for mode in (mode for mode in modes if mode != FROZEN):
        expected = observe(pair.plain, x, mode)
        assert not isinstance(expected, Raised), f"the patch itself fails: {expected.error!r}"
        found[mode] = difference(observe(pair.fused, x, mode), expected)
    return {mode: text for mode, text in found.items() if text}


def check(untouched: Pair, x: Tensor, patches: dict[str, Patch], modes: tuple[str, ...]) -> None:
    """Assert that each patch, made alike to copies of both, gives the same."""
    found = []
    for label, patch in patches.items():
        pair = untouched.copy()
        patch(pair.plain)
        patch(pair.fused)
        different = differences(pair, x, modes)
        if different:
            found.append(f"{label} ({', '.join(different)}): {next(iter(different.values()))}")
    assert not found, f"{len(found)} of {len(patches)} differ:\n" + "\n".join(found)


def at(path: str, change: Patch) -> Patch:
    return lambda root: change(root.get_submodule(path))


def own_methods(kind: type[nn.Module]) -> set[str]:
    """Of this package's classes, and forward of all others but lists, which nobody can call."""
    methods = public_methods(kind) - NOT_CALLED.keys() - FUSED_ALONE.keys()
    return methods | (set() if issubclass(kind, nn.ModuleList) else {"forward"})


def methods_patched(kind: str, modules: dict[str, nn.Module]) -> dict[str, Patch]:
    put = METHOD_PATCHES[kind]
    return {
        f"{path or 'itself'}.{method}": at(path, lambda m, n=method: put(m, n))
        for path, module in modules.items()
        for method in sorted(own_methods(type(module)))
    }


def everywhere(change: Patch, modules: dict[str, nn.Module]) -> dict[str, Patch]:
    return {path or "itself": at(path, change) for path in modules}


@pytest.mark.parametrize("name", [*BLOCKS, *ALIKE, *WHOLE])
@pytest.mark.parametrize("way", ["built", "fuse"])
def test_untouched_modules_run_fused(name: str, way: str) -> None:
    """Else all that follows would say nothing."""
    pair = pair_of(name, way)
    assert not differences(pair, input_of(name), ALL_MODES)
    check_runs_fused(pair.fused, input_of(name))
    if way == "built" and name != "attention":  # whole blocks alone are frozen
        assert observe_frozen(pair.fused, input_of(name)) is not None


@pytest.mark.parametrize("fused", [*CLASSES.values(), mk.MOAT], ids=lambda kind: kind.__name__)
def test_every_method_of_a_fused_class_is_a_plain_one_or_excluded(fused: type[nn.Module]) -> None:
    plain = {kind for kind in CLASSES if issubclass(fused, kind)} or {mk.MOAT}
    known = {method for kind in plain for method in public_methods(kind)}
    assert public_methods(fused) - known <= FUSED_ALONE.keys() | NOT_CALLED.keys()


def shows(name: str, patch: Patch) -> bool:
    """Whether the patch changes what the plain module computes."""
    for mode in ("eval", "train"):
        plain = pair_of(name, "plain").plain
        patch(plain)
        if difference(observe(plain, input_of(name), mode), untouched(name, mode)):
            return True
    return False


@cache
def untouched(name: str, mode: str) -> object:
    return observe(pair_of(name, "plain").plain, input_of(name), mode)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_patch_shows(name: str) -> None:
    """But for methods that plain blocks do not call, and weights of modules that have none."""
    modules = modules_of(name)
    patches = methods_patched("on the instance", modules)
    for kind, hook in HOOKS.items():
        for path, patch in everywhere(hook, modules).items():
            patches[f"{path} {kind}"] = patch
    uncalled = WITHOUT_EFFECT & public_methods(SUBJECTS[name].plain)
    expected = {f"itself.{method}" for method in uncalled}
    for path, module in modules.items():
        if not set(module._parameters) & {"weight", "bias"}:
            expected.add(f"{path or 'itself'} weights made at the call")
    assert {label for label, patch in patches.items() if not shows(name, patch)} == expected


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", METHOD_PATCHES)
def test_methods(name: str, kind: str) -> None:
    patches = methods_patched(kind, modules_of(name))
    check(pair_of(name, way_of(kind)), input_of(name), patches, ALL_MODES)


@pytest.mark.parametrize("name", ALIKE)
def test_methods_of_other_blocks(name: str) -> None:
    patches = methods_patched("by class", {"": modules_of(name)[""]})
    check(pair_of(name, "built"), input_of(name), patches, ALL_MODES)


@pytest.mark.parametrize("name", BLOCKS)
def test_methods_of_a_subclass_made_by_its_constructor(name: str) -> None:
    found = []
    for method in sorted(own_methods(SUBJECTS[name].plain)):
        pair = build_pair(name, DTYPE, "built", lambda kind, n=method: overriding(kind, n))
        different = differences(pair, input_of(name), ALL_MODES)
        found += [f"{method}, {mode}: {text}" for mode, text in different.items()]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", BLOCKS)
def test_methods_patched_in_their_classes(name: str) -> None:
    """For all modules of a class at once; in its own class where the fused module has another."""
    pair, x, found = pair_of(name, "built"), input_of(name), []
    kinds = {
        (type(m), type(pair.fused.get_submodule(path))) for path, m in modules_of(name).items()
    }
    for kind, fused_kind in sorted(kinds, key=str):
        for method in sorted(own_methods(kind)):
            with patched_class(kind, method):
                expected = observe(pair.plain, x, "no_grad")
            with patched_class(fused_kind, method):
                different = {"no_grad": difference(observe(pair.fused, x, "no_grad"), expected)}
                if (frozen := observe_frozen(pair.fused, x)) is not None:
                    different[FROZEN] = difference(frozen, outputs_only(expected))
            label = f"{fused_kind.__name__}.{method}"
            found += [f"{label}, {mode}: {text}" for mode, text in different.items() if text]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", [kind for kind in HOOKS if "options" not in kind])
def test_hooks(name: str, kind: str) -> None:
    patches = everywhere(HOOKS[kind], modules_of(name))
    check(pair_of(name, way_of(kind)), input_of(name), patches, modes_of(kind))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_hooks_of_all_modules(name: str, kind: str) -> None:
    """A hook for all modules at once that acts on one of them."""
    handle = GLOBAL_HOOKS[kind]()
    try:
        patches = everywhere(mark, modules_of(name))
        check(pair_of(name, "built"), input_of(name), patches, modes_of(kind))
    finally:
        handle.remove()


def large_modules(name: str) -> dict[str, nn.Module]:
    """Of a whole model: itself, stem, stages, blocks, head."""
    modules = modules_of(name).items()
    return {path: m for path, m in modules if path.count(".") <= 2 * path.startswith("stages")}


@pytest.mark.parametrize("kind", METHOD_PATCHES)
def test_methods_in_whole_models(kind: str) -> None:
    for name in WHOLE:
        every = large_modules(name)
        modules = every if (name, kind) == ("model", "on the instance") else {"": every[""]}
        patches = methods_patched(kind, modules)
        check(pair_of(name, "built"), input_of(name), patches, (FROZEN, "no_grad"))


@pytest.mark.parametrize("kind", ["forward hook", "forward pre-hook"])
def test_hooks_in_whole_models(kind: str) -> None:
    patches = everywhere(HOOKS[kind], large_modules("model"))
    check(pair_of("model", "built"), input_of("model"), patches, (FROZEN, "no_grad"))


def test_containers_of_blocks_are_called() -> None:
    """Entries of a list that are Sequential, and a stage that is one."""
    untouched = pair_of("model", "built")
    for model in (untouched.plain, untouched.fused):
        model.stages[0] = nn.Sequential(*model.stages[0])
        model.stages[2][1] = nn.Sequential(model.stages[2][1])
    for change in (*HOOKS.values(), lambda module: on_the_instance(module, "forward")):
        patches = {path: at(path, change) for path in ("stages.0", "stages.2.1")}
        check(untouched, input_of("model"), patches, (FROZEN, "no_grad"))


def blocks_of(name: str) -> list[tuple[Pair, Tensor]]:
    """One module of each class that `fuse` fuses in somebody else's model, and its input there."""
    plain = make_foreign_model(name)
    fused = copy.deepcopy(plain)
    inputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[module] = given[0].detach()

    paths = {entry.class_name: entry.path for entry in mk.fuse(fused).fused}
    for path in paths.values():
        fused.get_submodule(path).register_forward_pre_hook(keep)
    fused.eval()(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    pairs = [(plain.get_submodule(path), fused.get_submodule(path)) for path in paths.values()]
    for _, module in pairs:
        module._forward_pre_hooks.clear()
    return [(Pair(*pair), inputs[pair[1]]) for pair in pairs]


@pytest.mark.parametrize("name", FOREIGN)
def test_forward_and_hooks_in_other_peoples_blocks(name: str) -> None:
    for pair, x in blocks_of(name):
        modules = dict(pair.plain.named_modules())
        patched = {
            path: m for path, m in modules.items() if path and "forward" in own_methods(type(m))
        }
        check(pair, x, methods_patched("on the instance", patched), ("train",))
        handle = GLOBAL_HOOKS["forward hook"]()
        try:
            check(pair, x, everywhere(mark, modules), ("no_grad",))
        finally:
            handle.remove()
