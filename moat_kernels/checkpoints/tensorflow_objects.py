"""Object checkpoints of TensorFlow 2: which variable a tensor of the bundle is.

Their tensors are stored under keys that say how an object was reached
(``layer_with_weights-12/kernel/.ATTRIBUTES/VARIABLE_VALUE``). The object graph, a message in a
string tensor beside them, gives for each key the name of its variable. Message and field numbers
are those of TensorFlow's ``trackable_object_graph.proto``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from .errors import CheckpointError
from .tensorflow_bundle import TensorBundle
from .wire import Message, each_message

OBJECT_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
#: What the keys of all variables in an object checkpoint end in.
VARIABLE_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"

_NODES = 1
_CHILDREN, _ATTRIBUTES, _SLOTS = 1, 2, 3
_NODE_ID = 1
_FULL_NAME, _CHECKPOINT_KEY = 2, 3
_ORIGINAL_ID, _SLOT_ID = 1, 3
# Beyond every real graph: a SavedModel of 24 blocks has some 8,000 nodes, with 14,000 children, in
# 0.4 MB.
_MAXIMUM_GRAPH_BYTES = 1 << 22
_MAXIMUM_NODES = 1 << 17
# Children, attributes and slots of all nodes together, and the bytes of each.
_MAXIMUM_PARTS = 1 << 17
_MAXIMUM_PART_BYTES = 1 << 12


@dataclass(frozen=True, slots=True)
class ObjectVariable:
    """A variable in an object graph.

    Attributes:
        name: its full name, ``stage2_block0_mb_bn_01/gamma``; may be empty.
        key: the tensor of the bundle that holds it.
        is_slot: an optimizer keeps it for another variable.
    """

    name: str
    key: str
    is_slot: bool = False


def is_object_checkpoint(names: Iterable[str]) -> bool:
    """Whether tensors of these names are stored under keys of objects."""
    return any(name.endswith(VARIABLE_SUFFIX) for name in names)


def read_object_variables(bundle: TensorBundle) -> list[ObjectVariable]:
    """The variables that the object graph of ``bundle`` has, each once.

    Raises:
        CheckpointError: the graph is missing or damaged, or contradicts itself or the index.
    """
    graph = bundle.read_string(OBJECT_GRAPH_KEY, _MAXIMUM_GRAPH_BYTES)
    try:
        variables = parse_object_graph(graph)
        for variable in variables:
            if variable.key not in bundle.entries and variable.key not in bundle.skipped:
                raise CheckpointError(
                    f"{variable.name!r} is said to be under {variable.key!r}, "
                    "which the index does not have"
                )
    except CheckpointError as error:
        raise CheckpointError(f"{bundle.index_path}: its object graph: {error}") from None
    return variables


def parse_object_graph(graph: bytes) -> list[ObjectVariable]:
    """The variables of a ``TrackableObjectGraph`` message.

    Raises:
        CheckpointError: bytes that do not parse, nodes that do not exist, two names for one key.
    """
    found = _Graph()
    for _, node in each_message(graph, (_NODES,)):
        if found.nodes >= _MAXIMUM_NODES:
            raise CheckpointError(f"it has more than {_MAXIMUM_NODES} nodes")
        found.add(node)
    if found.largest_id >= found.nodes:
        raise CheckpointError(f"it speaks of node {found.largest_id}, but has only {found.nodes}")
    slots = {key for key, nodes in found.holders.items() if not found.slots.isdisjoint(nodes)}
    return [ObjectVariable(name, key, key in slots) for key, name in found.names.items()]


@dataclass
class _Graph:
    """What was read of a graph so far: by key the variable's name, and the nodes that hold it."""

    nodes: int = 0
    parts: int = 0
    largest_id: int = -1
    names: dict[str, str] = field(default_factory=dict)
    holders: dict[str, list[int]] = field(default_factory=dict)
    slots: set[int] = field(default_factory=set)

    def add(self, node: bytes) -> None:
        for number, content in each_message(node, (_CHILDREN, _ATTRIBUTES, _SLOTS)):
            self.parts += 1
            if self.parts > _MAXIMUM_PARTS or len(content) > _MAXIMUM_PART_BYTES:
                raise CheckpointError(
                    f"its nodes have more than {_MAXIMUM_PARTS} children, attributes and slots, or "
                    f"one of more than {_MAXIMUM_PART_BYTES} bytes"
                )
            message = Message(content)
            if number == _ATTRIBUTES:
                self._add_attribute(message)
            elif number == _CHILDREN:
                self._mention(message.integer(_NODE_ID))
            else:
                self._mention(message.integer(_ORIGINAL_ID))
                self._mention(message.integer(_SLOT_ID))
                self.slots.add(message.integer(_SLOT_ID))
        self.nodes += 1

    def _mention(self, node: int) -> None:
        self.largest_id = max(self.largest_id, node)

    def _add_attribute(self, attribute: Message) -> None:
        key, name = attribute.text(_CHECKPOINT_KEY), attribute.text(_FULL_NAME)
        # Objects that are no variables have attributes too.
        if not key.endswith(VARIABLE_SUFFIX):
            return
        first = self.names.setdefault(key, name)
        if first != name:
            raise CheckpointError(f"{key!r} is both {first!r} and {name!r}")
        self.holders.setdefault(key, []).append(self.nodes)


class ObjectMapping(Mapping[str, np.ndarray]):
    """A bundle's tensors by other names, ``{name: key}``; read when they are asked for."""

    def __init__(self, bundle: TensorBundle, keys: Mapping[str, str]) -> None:
        self._bundle = bundle
        self._keys = keys

    def __getitem__(self, name: str) -> np.ndarray:
        return self._bundle[self._keys[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
