"""Calls with wrong arguments, each of which must raise or give the right result.

    python -m support.wrong_arguments native_calls 5 progress.txt

makes, of every tensor argument of every call in `support.native_calls`, each wrong version 5 times.
A call that ends the process is named in progress.txt; the others that go wrong are printed.
"""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.tolerances import relative_error

# What Python code may catch; stock PyTorch raises these.
ERRORS = (RuntimeError, ValueError, TypeError, IndexError)
# Far from rounding in the lowest precision, and far nearer than any wrong element.
TOLERANCES = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
Place = tuple[int, ...]  # indices into arguments, and into lists among them


@dataclass(frozen=True)
class Call:
    """A call to be made with wrong arguments.

    function: called with `arguments`, a list of tensors, of lists of tensors and of settings.
    reference: the same in plain PyTorch. None: the call is right if it gives what the valid
        arguments give, which only corruptions that keep all values can.
    optional: whether tensors other than the first may be left out.
    """

    name: str
    function: Callable[..., Any]
    arguments: list[Any]
    reference: Callable[..., Any] | None = None
    optional: bool = True


def with_fields(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op for arguments of which some are lists of fields, one after the other."""

    def call(*arguments: Any) -> Any:
        return op(*(field for a in arguments for field in (a if isinstance(a, list) else [a])))

    return call


def _strided(tensor: Tensor, rng: random.Random) -> Tensor:
    """The same values with gaps between them, or with the axes of memory reversed."""
    if tensor.dim() > 1 and rng.random() < 0.5:
        axes = tuple(reversed(range(tensor.dim())))
        return tensor.permute(axes).contiguous().permute(axes)
    wide = tensor.new_full((*tensor.shape, 2), 77)
    wide[..., 0] = tensor
    return wide[..., 0]


def _other_extent(tensor: Tensor, rng: random.Random) -> Tensor:
    sizes = list(tensor.shape)
    axis = rng.randrange(len(sizes))
    sizes[axis] = max(0, sizes[axis] + rng.choice([-2, -1, 1, 2, 16, sizes[axis]]))
    return _values(tuple(sizes), tensor, rng)


def _swapped(tensor: Tensor, rng: random.Random) -> Tensor:
    """As many elements in another shape."""
    first, second = rng.sample(range(tensor.dim()), 2) if tensor.dim() > 1 else (0, 0)
    swapped = tensor.transpose(first, second)
    return tensor if swapped.shape == tensor.shape else swapped.contiguous()


def _empty(tensor: Tensor, rng: random.Random) -> Tensor:
    sizes = list(tensor.shape)
    sizes[rng.randrange(len(sizes))] = 0
    return tensor.new_empty(sizes)


def _values(sizes: tuple[int, ...], like: Tensor, rng: random.Random) -> Tensor:
    if like.dtype == torch.uint8:
        return torch.zeros(sizes, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return exact(torch.rand(sizes, generator=generator) + 0.25).to(like.dtype)


def exact(tensor: Tensor) -> Tensor:
    """Rounded to 1/16: values that every floating-point dtype holds."""
    return (tensor * 16).round() / 16


CORRUPTIONS: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "other extent": _other_extent,
    "swapped axes": _swapped,
    "flat": lambda tensor, _: tensor.reshape(-1),
    "one axis less": lambda tensor, rng: tensor.select(rng.randrange(tensor.dim()), 0).contiguous(),
    "one axis more": lambda tensor, rng: tensor.unsqueeze(rng.randrange(tensor.dim() + 1)),
    "scalar": lambda tensor, _: tensor.reshape(-1)[:1].sum(),
    "empty": _empty,
    "zero width": lambda tensor, _: tensor.new_empty(*tensor.shape[:-1], 0),
    "floating dtype": lambda tensor, rng: tensor.to(
        rng.choice([d for d in TOLERANCES if d != tensor.dtype])
    ),
    "other dtype": lambda tensor, rng: tensor.to(
        rng.choice([torch.int64, torch.bool, torch.complex64])
    ),
    "meta": lambda tensor, _: tensor.to("meta"),
    "strided": _strided,
    "missing": lambda tensor, _: None,
}
# Of these the result is that of the valid arguments, if there is one.
KEEP_VALUES = ("floating dtype", "strided", "swapped axes", "flat", "one axis more", "other extent")
SETTINGS = (-1, 0, 1, 3, 1 << 40)


def _places(arguments: list[Any], kind: type, prefix: Place = ()) -> Iterator[Place]:
    for index, argument in enumerate(arguments):
        if type(argument) is kind:
            yield (*prefix, index)
        elif isinstance(argument, list):
            yield from _places(argument, kind, (*prefix, index))


def _at(arguments: list[Any], place: Place) -> Any:
    for index in place:
        arguments = arguments[index]
    return arguments


def _copy(arguments: list[Any], place: Place = (), value: Any = None) -> list[Any]:
    """A deep copy, with `value` at `place` unless that is empty."""
    copied = [
        argument.clone()
        if isinstance(argument, Tensor)
        else _copy(argument)
        if isinstance(argument, list)
        else argument
        for argument in arguments
    ]
    if place:
        inner = copied
        for index in place[:-1]:
            inner = inner[index]
        inner[place[-1]] = value
    return copied


def in_float64(argument: Any) -> Any:
    """The argument with all its tensors in float64, but those of bytes."""
    if isinstance(argument, list):
        return [in_float64(element) for element in argument]
    if isinstance(argument, Tensor) and argument.dtype != torch.uint8:
        return argument.detach().clone().to(torch.float64)
    return argument


def _results(outcome: Any) -> list[Tensor | None]:
    return [outcome] if isinstance(outcome, Tensor) else list(outcome)


def _difference(
    actual: list[Tensor | None], expected: list[Tensor | None], dtypes: set[torch.dtype]
) -> str:
    """What is wrong with results that were computed from `dtypes`; empty: nothing."""
    tolerance = max(TOLERANCES.get(dtype, 0.0) for dtype in dtypes)
    for index, (value, correct) in enumerate(zip(actual, expected, strict=True)):
        if correct is None or value is None:  # not compared
            continue
        if value.shape != correct.shape:
            return f"result {index} is {tuple(value.shape)} instead of {tuple(correct.shape)}"
        if value.device != correct.device:
            return f"result {index} is on {value.device} instead of {correct.device}"
        if value.is_meta or not value.numel():
            continue
        error = relative_error(value.double(), correct.double())
        if not error <= tolerance:
            return f"result {index} is off by {error}"
    return ""


def _reason_wrong(call: Call, arguments: list[Any], keeps_values: bool | None) -> str:
    """How the call went wrong; empty if it raised or gave the right result.

    keeps_values: None where neither the reference nor the valid result says what is right.
    """
    try:
        actual = _results(call.function(*_copy(arguments)))
    except ERRORS:
        return ""
    except Exception as error:
        return _reason_wrong_error(call, arguments, error)
    tensors = [_at(arguments, place) for place in _places(arguments, Tensor)]
    written = [result for result in actual if result is not None and not result.is_meta]
    if any(tensor.is_meta for tensor in tensors) and written:
        return "was computed from a tensor without data"
    if keeps_values is None and call.reference is None:
        return ""
    if call.reference is None and not keeps_values:
        return "was accepted"
    try:
        if call.reference is not None:
            expected = _results(call.reference(*in_float64(arguments)))
        else:
            expected = _results(call.function(*_copy(call.arguments)))
    except ERRORS as error:
        if not any(result is not None and result.numel() for result in actual):
            return ""  # nothing, of a batch of none
        return f"was accepted, but plain PyTorch says: {error}"
    return _difference(actual, expected, {tensor.dtype for tensor in tensors})


def _reason_wrong_error(call: Call, arguments: list[Any], error: Exception) -> str:
    """Empty if plain PyTorch raises such an error too, as timm does by `assert`."""
    plain: Exception | None = None
    try:
        if call.reference is not None:
            call.reference(*in_float64(arguments))
    except Exception as raised:
        plain = raised
    return "" if type(plain) is type(error) else f"raised {type(error).__name__}: {error}"


def wrong_versions(
    call: Call, draws: int, rng: random.Random
) -> Iterator[tuple[str, list[Any], bool | None]]:
    """(What is wrong, the arguments, whether they have the valid values) for every place."""
    for place in _places(call.arguments, Tensor):
        tensor = _at(call.arguments, place)
        for kind, corrupt in CORRUPTIONS.items():
            for draw in range(draws):
                keeps: bool | None = kind in KEEP_VALUES
                if kind == "missing":
                    keeps = None
                    if draw or place == (0,) or not call.optional:
                        break
                value = corrupt(tensor.clone(), rng)
                described = "None" if value is None else f"{tuple(value.shape)} {value.dtype}"
                text = f"{call.name}: argument {place}: {kind}: {described}"
                yield text, _copy(call.arguments, place, value), keeps
    for place in _places(call.arguments, int):
        for value in rng.sample(SETTINGS, min(draws, len(SETTINGS))):
            text = f"{call.name}: argument {place}: {value}"
            yield text, _copy(call.arguments, place, value), None


def run(calls: list[Call], draws: int, progress: int) -> tuple[int, list[str]]:
    """How many calls were made, and what went wrong. progress: a file, which names the call."""
    count, failures = 0, []
    for call in calls:
        rng = random.Random(call.name)
        wrong = _reason_wrong(call, call.arguments, True)
        if wrong:
            failures.append(f"{call.name}: with valid arguments: {wrong}")
        call.function(*_copy(call.arguments))  # valid arguments do not raise
        for text, arguments, keeps_values in wrong_versions(call, draws, rng):
            os.ftruncate(progress, 0)
            os.pwrite(progress, text.encode(), 0)
            count += 1
            wrong = _reason_wrong(call, arguments, keeps_values)
            if wrong:
                failures.append(f"{text} {wrong}")
    return count, failures


def run_in_process(module: str, draws: int, folder: Path) -> int:
    """Make the wrong calls of a module of this folder, `draws` of each kind; how many.

    Fails if any goes wrong, with the name of a call that ended the process.
    """
    progress = folder / "progress.txt"
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-m", "support.wrong_arguments", module, str(draws), str(progress)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    last = progress.read_text() if progress.exists() else "no call"
    output = result.stdout[-6000:] + result.stderr[-6000:]
    assert result.returncode in (0, 1), f"signal {-result.returncode} at {last}\n{output}"
    assert result.returncode == 0, output
    return int(result.stdout.split()[-4])


def main() -> int:
    module, draws, progress_file = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN: it shows
    torch.manual_seed(0)
    calls = importlib.import_module(f"support.{module}").calls()
    progress = os.open(Path(progress_file), os.O_CREAT | os.O_WRONLY)
    count, failures = run(calls, int(draws), progress)
    print("\n".join(failures))
    print(f"{count} calls, {len(failures)} wrong")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
