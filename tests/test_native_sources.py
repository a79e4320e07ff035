"""The rules of csrc/: names, who may include what, and what instruction sets may share.

csrc/cpu/common/per_isa.h says why the files of csrc/cpu/isa may share nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePath

import pytest
from support import unoptimized

CSRC = unoptimized.ROOT / "csrc"
FILES = sorted(path for path in CSRC.rglob("*") if path.is_file())
# Folder of csrc/cpu -> those whose headers its files may include.
FOLDERS = {"isa": {"isa", "common"}, "common": {"common"}, "host": {"host", "common"}}
# Types, and intrinsics that are always inlined.
STANDARD_HEADERS = {
    "isa": {"cstddef", "cstdint", "utility", "immintrin.h"},
    "common": {"cstdint"},
}
compiles = pytest.mark.skipif(
    bool(unoptimized.reason_unavailable()), reason=unoptimized.reason_unavailable()
)


def ambiguous_names(paths: Iterable[PurePath]) -> list[str]:
    """Stems that several files have, but for a header and the source of what it declares."""
    suffixes: dict[str, list[str]] = {}
    for path in paths:
        suffixes.setdefault(path.stem, []).append(path.suffix)
    return [
        stem
        for stem, found in suffixes.items()
        if len(found) > 1 and sorted(found) != [".cpp", ".h"]
    ]


def forbidden_includes(folder: str, text: str) -> list[str]:
    """What a file of csrc/cpu/<folder> includes and may not."""
    found = []
    for name in re.findall(r'#include ["<](.+)[">]', text):
        if name.startswith("cpu/"):
            allowed = PurePath(name).parts[1] in FOLDERS[folder]
        else:
            allowed = folder == "host" or name in STANDARD_HEADERS[folder]
        if not allowed:
            found.append(name)
    return found


def test_no_name_exists_twice() -> None:
    assert not ambiguous_names(FILES)


@pytest.mark.parametrize(
    "names",
    [
        ("cpu/host/gemm.cpp", "cpu/isa/gemm.cpp"),
        ("cpu/host/gemm.cpp", "cpu/host/gemm.h", "cpu/isa/gemm.h"),
        ("cpu/isa/gemm.h", "cuda/gemm.cuh"),
    ],
)
def test_a_name_that_existed_twice_would_be_noticed(names: tuple[str, ...]) -> None:
    assert ambiguous_names(map(PurePath, names)) == ["gemm"]


def test_every_file_lies_in_a_folder_with_rules() -> None:
    folders = {path.relative_to(CSRC / "cpu").parts[0] for path in FILES if "cpu" in path.parts}
    assert folders == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_include_what_their_folder_may(folder: str) -> None:
    for path in (CSRC / "cpu" / folder).iterdir():
        assert not forbidden_includes(folder, path.read_text()), path


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("isa", "<algorithm>"),
        ("isa", '"cpu/host/tensors.h"'),
        ("isa", '"tensor_checks.h"'),
        ("common", '"cpu/isa/simd.h"'),
        ("common", "<vector>"),
        ("host", '"cpu/isa/simd.h"'),
    ],
)
def test_a_forbidden_include_would_be_noticed(folder: str, name: str) -> None:
    text = f'#include <cstdint>\n\n#include "cpu/common/types.h"\n#include {name}\n'
    assert forbidden_includes(folder, text) == [name.strip('<>"')]


@compiles
def test_instruction_sets_share_no_function() -> None:
    objects = unoptimized.build(unoptimized.SOURCES, CSRC.parent / "build" / "unoptimized")
    assert not unoptimized.shared_symbols(objects)


def symbols_of(code: str, directory: Path) -> list[str]:
    """Of a file of csrc/cpu/isa with this code in the middle of it."""
    source = directory / "planted.cpp"
    source.write_text(
        "#include <algorithm>\n"
        "namespace moat_kernels::cpu {\n"
        "inline int64_t twice(int64_t value) { return 2 * value; }\n"
        "template <class T> struct Shared { static inline T value = 1; };\n"
        "struct Map {\n"
        "  int64_t side;\n"
        "  int64_t pixels() const { return side * side; }\n"
        "  [[gnu::always_inline]] int64_t border() const { return 4 * side; }\n"
        "};\n"
        "namespace MOAT_KERNELS_ISA {\n"
        "struct Own { int64_t value; };\n"
        "inline bool operator<(const Own& a, const Own& b) { return a.value < b.value; }\n"
        "template <class T> T half(T value) { return value / 2; }\n"
        "namespace { int64_t next(int64_t value) { return value + 1; } }\n"
        f"int64_t kernel(int64_t value) {{ return {code}; }}\n"
        "}}\n"
    )
    return unoptimized.shared_symbols(unoptimized.build([source], directory / "build"))


@compiles
@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("std::max(value, int64_t{1})", "max"),
        ("twice(value)", "twice"),
        ("Shared<int64_t>::value", "Shared"),
        ("Map{value}.pixels()", "pixels"),
    ],
)
def test_a_shared_function_would_be_noticed(code: str, name: str, tmp_path: Path) -> None:
    (symbol,) = symbols_of(code, tmp_path)
    assert name in symbol


@compiles
@pytest.mark.parametrize(
    "code",
    ["half(value)", "next(value)", "Map{value}.border()", "std::max(Own{value}, Own{1}).value"],
)
def test_what_an_instruction_set_has_for_itself_is_allowed(code: str, tmp_path: Path) -> None:
    assert not symbols_of(code, tmp_path)
