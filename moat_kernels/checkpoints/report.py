"""What a conversion or a load did, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

_EXAMPLES = 3


@dataclass
class CheckpointReport:
    """An account of a checkpoint: nothing in it is left out silently.

    Attributes:
        origin: the file, or how the variables were given.
        loaded: for every tensor of the state_dict, the names in the file it was made of.
        source: for every tensor of the state_dict, ``"raw"`` (the variable itself), ``"ema"`` (its
            exponential moving average) or ``"initial"`` (in no checkpoint: starts at zero).
        skipped: every name in the file that was not used, with the reason.
        adapted: what was changed, or is computed otherwise, to fit the model.
        assumed: what the file does not tell about its model, and was taken for granted.
    """

    origin: str
    loaded: dict[str, tuple[str, ...]] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    adapted: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        sources = Counter(self.source.values())
        counts = ", ".join(f"{count} {source}" for source, count in sorted(sources.items()))
        variables = sum(map(len, self.loaded.values()))
        lines = [
            f"checkpoint {self.origin}",
            f"loaded {len(self.loaded)} tensors ({counts}) from {variables} variables",
        ]
        names_by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            names_by_reason.setdefault(reason, []).append(name)
        for reason, names in names_by_reason.items():
            examples = ", ".join(names[:_EXAMPLES]) + (", ..." if len(names) > _EXAMPLES else "")
            lines.append(f"skipped {len(names)}: {reason}: {examples}")
        lines += [f"assumed: {line}" for line in self.assumed]
        lines += [f"adapted: {line}" for line in self.adapted]
        return "\n".join(lines)
