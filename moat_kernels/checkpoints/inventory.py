"""Sorting out the names in a checkpoint: what is a variable of MOAT, and what is not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .errors import CheckpointError
from .names import OFFICIAL, SCOPES
from .rules import Naming, Place, Rule
from .tensorflow_objects import is_object_checkpoint

NO_AVERAGES = "ema=True, but it has no exponential moving averages"
OPTIMIZER_SLOT = "optimizer slot"
NOT_OF_MOAT = "not a variable of MOAT"
_AVERAGE_SUFFIX = "/ExponentialMovingAverage"
_STAGES = 4
# block_02_01/attention/q/weight
_MAXIMUM_PARTS = 4


@dataclass
class Inventory:
    """The names in a checkpoint, sorted. Variables are named without scope (``stem/conv_0/bias``).

    Attributes:
        origin: what messages call the checkpoint.
        ema: whether averages are taken where they exist.
        naming: how the variables are called.
        scope: the scope of all variables, ``moat`` or ``mbconv``; empty if they have none.
        raw: variable -> its name in the checkpoint.
        averages: variable -> the name of its exponential moving average.
        places: variable -> the module it belongs to.
        skipped: name in the checkpoint -> why it is not used.
    """

    origin: str
    ema: bool
    naming: Naming = OFFICIAL
    scope: str = ""
    raw: dict[str, str] = field(default_factory=dict)
    averages: dict[str, str] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def key(self, variable: str) -> str | None:
        """The name in the checkpoint that is taken for ``variable``; None if it is missing."""
        average = self.averages.get(variable) if self.ema else None
        return average or self.raw.get(variable)

    def required_key(self, variable: str) -> str:
        key = self.key(variable)
        if key is None:
            hint = " (only its average exists: ema=True)" if variable in self.averages else ""
            raise self.error(f"{self.full_name(variable)} is missing{hint}")
        return key

    def source(self, rule: Rule, prefix: str) -> str:
        """``raw``, ``ema`` or ``initial``: where the parameter of ``rule`` comes from."""
        if not rule.variables:
            return "initial"
        names = [prefix + variable for variable in rule.variables]
        averaged = [self.ema and name in self.averages for name in names]
        if any(averaged) and not all(averaged):
            raise self.error(
                f"of {', '.join(map(self.full_name, names))}, which form one parameter, "
                "some have an average and some have none"
            )
        return "ema" if any(averaged) else "raw"

    def full_name(self, variable: str) -> str:
        return f"{self.scope}/{variable}" if self.scope else variable

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.origin}: {message}")


def take_inventory(names: Iterable[str], *, ema: bool, origin: str) -> Inventory:
    """Sort the names of an official checkpoint.

    Raises:
        CheckpointError: no variable of MOAT is there, one is there twice, or one is unknown.
    """
    names = list(names)
    inventory = Inventory(origin, ema)
    if is_object_checkpoint(names):
        raise inventory.error(
            "names of an object-based TensorFlow 2 checkpoint, not of variables "
            "(moat/stem/conv_0/kernel, ...); load_tensorflow reads such files"
        )
    for name in names:
        _sort_in(inventory, name)
    if not inventory.raw and not inventory.averages:
        raise inventory.error(
            f"no variable of MOAT (moat/... or mbconv/...) among its {len(names)} names, "
            f"which begin with {names[:3]}"
        )
    if ema and not inventory.averages:
        raise inventory.error(NO_AVERAGES)
    for variable, average in inventory.averages.items():
        if not ema:
            inventory.skipped[average] = "average, the raw value is taken"
        elif variable in inventory.raw:
            inventory.skipped[inventory.raw[variable]] = "raw value, the average is taken"
    return inventory


def _sort_in(inventory: Inventory, name: str) -> None:
    bare = name.removesuffix(":0")
    base = bare.removesuffix(_AVERAGE_SUFFIX)
    scope, _, variable = base.partition("/")
    if scope not in SCOPES:
        inventory.skipped[name] = NOT_OF_MOAT
        return
    known = OFFICIAL.find_variable(variable)
    if known is None:
        if not is_slot(variable, OFFICIAL):
            raise inventory.error(f"{name} is not a variable that MOAT is known to have")
        inventory.skipped[name] = OPTIMIZER_SLOT
        return
    if inventory.scope not in ("", scope):
        raise inventory.error(f"{name} is there beside variables in {inventory.scope}/")
    inventory.scope = scope
    found = inventory.raw if base == bare else inventory.averages
    if variable in found:
        raise inventory.error(f"{found[variable]} and {name} are the same variable")
    found[variable] = name
    inventory.places[variable] = known[0]


def is_slot(variable: str, naming: Naming) -> bool:
    """Optimizers name their slots <variable>/<slot>, for example .../kernel/Adam_1."""
    parts = variable.split("/", _MAXIMUM_PARTS + 1)
    starts = ("/".join(parts[:count]) for count in range(1, len(parts)))
    return any(naming.find_variable(start) is not None for start in starts)


def find_places(inventory: Inventory) -> list[Place]:
    """The modules a checkpoint must hold, in order, as far as its own names tell."""
    present, naming = set(inventory.places.values()), inventory.naming
    single = Place("single", naming)
    if single in present:
        if len(present) > 1:
            raise inventory.error("variables of a whole model beside those of a single block")
        return [single]
    places = [Place("stem", naming)]
    for stage in range(_STAGES):
        last = max((place.index for place in present if _is_block_of(place, stage)), default=0)
        # Blocks that are missing below the last are found when their variables are looked up.
        places += [Place("block", naming, stage, index) for index in range(last + 1)]
    if (head := Place("head", naming)) in present:
        places.append(head)
    if surplus := present.difference(places):
        prefix = min(place.variable_prefix for place in surplus)
        raise inventory.error(f"{inventory.full_name(prefix)}: MOAT has only {_STAGES} stages")
    return places


def _is_block_of(place: Place, stage: int) -> bool:
    return place.kind == "block" and place.stage == stage
