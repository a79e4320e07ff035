"""Compiles csrc/cuda by nvcc, without a GPU, and reads what ptxas says of every kernel, and makes.

`python tests/support/nvcc.py` writes the tables in docs/cuda_kernels.md, and what they were made of
into docs/cuda_kernels.csv: who has the same sources and compiler need not compile them again.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import machine_code

ROOT = Path(__file__).parent.parent.parent
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
HEADERS = sorted(CUDA.glob("*.*h"))
DOCUMENT = ROOT / "docs" / "cuda_kernels.md"
KEPT = ROOT / "docs" / "cuda_kernels.csv"
# Where each table stands, and what ends it.
REGISTERS_TABLE = "<!-- table: tests/support/nvcc.py -->\n"
INSTRUCTIONS_TABLE = "<!-- table of instructions: tests/support/nvcc.py -->\n"
TABLE_END = "<!-- end of table -->\n"

ARCHITECTURES = (80, 90, 100, 120)
# Of one multiprocessor (CUDA programming guide, compute capabilities): shared memory in bytes, most
# warps at once. All have 65536 registers, given to warps in units of 256.
SHARED_BYTES = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
MOST_WARPS = {80: 64, 90: 64, 100: 64, 120: 48}
REGISTERS, REGISTER_UNIT = 65536, 256
# What the system takes of shared memory for each block, and the most that a block may declare.
RESERVED_SHARED_BYTES = 1 << 10
MOST_STATIC_SHARED_BYTES = 48 << 10
# Whose instructions are documented: architectures, and what training launches (activations of the
# input, and of the output if it has one).
COUNTED = (80, 90)
TRAINED = {"depthwise_backward_kernel": ("gelu",), "depthwise_forward_kernel": ("gelu", "identity")}
# Channels of a lane of the stencils (columns.cuh).
LANE_CHANNELS = 2

FLAGS = ("-std=c++17", "-O3", "-fatbin", "-Xptxas", "-v", "--keep")
_DTYPES = {"f": "float32", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}
_ACTIVATIONS = ("identity", "gelu")  # as launchers.h counts them


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: what ptxas reports, and instructions of its PTX.

    row_instructions: in the machine code of a stencil's loop over rows, and `rows`, which the loop
        takes at a time, each with a barrier; 0 for other kernels.
    """

    name: str
    architecture: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int
    loads_of_pairs: int
    matrix_multiplies: int
    asynchronous_copies: int
    row_instructions: int
    rows: int

    @property
    def instructions_per_element(self) -> float:
        """Of a stencil: instructions of its loop over rows for each element of its input."""
        stride = int(self.name[-2])
        return self.row_instructions / (self.rows * stride**2 * LANE_CHANNELS)

    @property
    def warps(self) -> int:
        """Warps that a multiprocessor can hold at once."""
        block_warps = self.threads // 32
        unit = REGISTER_UNIT
        warp_registers = -(-self.registers * 32 // unit) * unit
        blocks = min(
            MOST_WARPS[self.architecture] // block_warps,
            REGISTERS // warp_registers // block_warps,
            SHARED_BYTES[self.architecture] // (self.shared_bytes + RESERVED_SHARED_BYTES),
        )
        return blocks * block_warps


COLUMNS = ("key", *(field.name for field in fields(Kernel)))


def nvcc_version() -> str:
    """Such as "13.0"; empty where there is no nvcc."""
    if shutil.which("nvcc") is None:
        return ""
    output = subprocess.check_output(["nvcc", "--version"], text=True)
    match = re.search(r"release ([\d.]+)", output)
    return match[1] if match else ""


def include_flags() -> list[str]:
    """Where CUDA's own headers lie, as g++ is told: without warnings about them."""
    command = ["nvcc", "--dryrun", str(SOURCES[0]), "-o", "unused"]
    plan = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (line,) = re.findall(r"^#\$ INCLUDES=(.*)$", plan, re.MULTILINE)
    return [flag.replace("-I", "-isystem", 1) for flag in shlex.split(line)]


def readable(mangled: str) -> str:
    """depthwise_backward_kernel<bfloat16, gelu, 1>, from its mangled name."""
    match = re.search(
        r"\d([a-z][a-z_]*_kernel)(?![a-z])"
        r"(?:I(f|13__nv_bfloat16|6__half)((?:LN\w*?ActivationE\dE|LS\d_\dE)*)Li(\d)EE)?",
        mangled,
    )
    assert match, mangled
    if not match[2]:
        return match[1]
    activations = (_ACTIVATIONS[int(kind)] for kind in re.findall(r"[E_](\d)E", match[3]))
    return f"{match[1]}<{', '.join((_DTYPES[match[2]], *activations, match[4]))}>"


def _read_ptx(text: str) -> dict[str, dict[str, int]]:
    """Threads of a block and counted instructions, by kernel."""
    entries = re.split(r"\.entry ", text)[1:]
    return {
        readable(entry[: entry.index("(")]): {
            "threads": int(re.search(r"\.maxntid (\d+)", entry)[1]),
            "loads_of_pairs": len(re.findall(r"ld\.global[\w.]*\.(u32|v2\.\w32)", entry)),
            "matrix_multiplies": entry.count("mma.sync"),
            "asynchronous_copies": entry.count("cp.async.cg"),
        }
        for entry in entries
    }


def _read_machine_code(cubin: Path) -> dict[str, dict[str, int]]:
    """The loops over rows, by kernel."""
    found = {}
    for function in machine_code.disassemble(cubin.read_bytes()):
        name, loop, rows = readable(function.name), (), 0
        if name.startswith("depthwise"):
            barriers = function.find("BAR")
            inside = (function.innermost(barrier) for barrier in barriers)
            loop = min((one for one in inside if one is not None), key=len)
            rows = sum(barrier in loop for barrier in barriers)
        found[name] = {"row_instructions": len(loop), "rows": rows}
    return found


def _read_ptxas(text: str) -> list[dict]:
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    kernels = []
    for mangled, architecture, stores, loads, registers, rest in pattern.findall(text):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            {
                "name": readable(mangled),
                "architecture": int(architecture),
                "registers": int(registers),
                "spilled_bytes": int(stores) + int(loads),
                "shared_bytes": int(shared[1]) if shared else 0,
            }
        )
    return kernels


def _compile(source: Path, architectures: tuple[int, ...]) -> list[Kernel]:
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    with tempfile.TemporaryDirectory() as directory:
        result = subprocess.run(
            ["nvcc", *FLAGS, f"-I{ROOT / 'csrc'}", *targets, str(source), "-o", "kernels.fatbin"],
            cwd=directory,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        counted: dict[tuple[int, str], dict[str, int]] = {}
        for architecture in architectures:
            # The name tells the architecture only if there are several.
            suffix = f".compute_{architecture}" if len(architectures) > 1 else ""
            kept = Path(directory) / f"{source.stem}{suffix}"
            loops = _read_machine_code(kept.with_name(f"{kept.name}.cubin"))
            ptx = _read_ptx(kept.with_name(f"{kept.name}.ptx").read_text())
            counted |= {(architecture, name): ptx[name] | loops[name] for name in ptx}
    return [
        Kernel(**kernel, **counted[kernel["architecture"], kernel["name"]])
        for kernel in _read_ptxas(result.stderr)
    ]


@functools.cache
def _build() -> str:
    """Such as "V13.0.88": compilers of one version differ in it."""
    output = subprocess.check_output(["nvcc", "--version"], text=True)
    return re.findall(r"V[\d.]+", output)[-1]


def compile_cubin(source: Path, architecture: int) -> bytes:
    """The machine code of all kernels of `source`."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernels.cubin"
        command = ["nvcc", "-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}"]
        subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(cubin)], check=True)
        return cubin.read_bytes()


def source_hash(source: Path) -> str:
    """Of all that is compiled of `source`, by whichever compiler."""
    texts = (file.read_text() for file in (source, *HEADERS))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def _key(source: Path, architectures: tuple[int, ...]) -> str:
    """Of all that decides what is compiled of `source`, and how it is read."""
    parts = [_build(), *map(str, architectures), *FLAGS]
    parts += (f.read_text() for f in (source, *HEADERS))
    parts += (Path(module).read_text() for module in (__file__, machine_code.__file__))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@functools.cache
def _kept() -> dict[str, list[Kernel]]:
    """The kernels in the document, by key."""
    kept: dict[str, list[Kernel]] = {}
    with KEPT.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(COLUMNS):
            return {}  # of a time when other things were counted
        for row in reader:
            key, name = row.pop("key"), row.pop("name")
            numbers = {field: int(value) for field, value in row.items()}
            kept.setdefault(key, []).append(Kernel(name=name, **numbers))
    return kept


def documented() -> bool:
    """Whether the document was made of these sources by this compiler."""
    return all(_key(source, ARCHITECTURES) in _kept() for source in SOURCES)


def compile_kernels(source: Path, architectures: tuple[int, ...] = ARCHITECTURES) -> list[Kernel]:
    """The kernels of `source` for some architectures, compiled where nobody has them kept."""
    key = _key(source, architectures)
    if key in _kept():
        return _kept()[key]
    cached = ROOT / "build" / "nvcc" / f"{source.stem}-{key}.json"
    if not cached.exists():
        kernels = _compile(source, architectures)
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_text(json.dumps([asdict(kernel) for kernel in kernels]))
    return [Kernel(**kernel) for kernel in json.loads(cached.read_text())]


@functools.cache
def all_kernels() -> list[Kernel]:
    """Of all sources; two compilers at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [kernel for kernels in pool.map(compile_kernels, SOURCES) for kernel in kernels]


def registers_table() -> str:
    """Markdown: registers, and warps per multiprocessor, of every kernel and architecture."""
    header = ["kernel", "threads", "shared bytes", *(f"sm_{a}" for a in ARCHITECTURES)]
    lines = [
        f"Compiled by nvcc {nvcc_version()}: registers of a thread / warps that a multiprocessor "
        "can hold at once.",
        "",
        "| " + " | ".join(header) + " |",
        "|---" + "|---:" * (len(header) - 1) + "|",
    ]
    kernels = {(kernel.name, kernel.architecture): kernel for kernel in all_kernels()}
    for name in dict.fromkeys(kernel.name for kernel in all_kernels()):
        versions = [kernels[name, architecture] for architecture in ARCHITECTURES]
        shared = sorted({kernel.shared_bytes for kernel in versions})
        cells = [f"{kernel.registers} / {kernel.warps}" for kernel in versions]
        row = [f"`{name}`", str(versions[0].threads), ", ".join(map(str, shared)), *cells]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def instructions_table() -> str:
    """Markdown: instructions for each element, of the stencils as training launches them."""
    versions = [(dtype, a) for dtype in ("bfloat16", "float32") for a in COUNTED]
    header = ["kernel", *(f"{dtype}, sm_{architecture}" for dtype, architecture in versions)]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * len(versions) + "|"]
    kernels = {(kernel.name, kernel.architecture): kernel for kernel in all_kernels()}
    for (kernel, activations), stride in itertools.product(TRAINED.items(), (1, 2)):
        cells = [f"`{kernel}`, stride {stride}"]
        for dtype, architecture in versions:
            name = f"{kernel}<{', '.join((dtype, *activations, str(stride)))}>"
            cells.append(f"{kernels[name, architecture].instructions_per_element:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


TABLES = {REGISTERS_TABLE: registers_table, INSTRUCTIONS_TABLE: instructions_table}


def documented_table(start: str) -> str:
    return DOCUMENT.read_text().partition(start)[2].partition(TABLE_END)[0]


def main() -> None:
    """Bring both documents up to date."""
    for start, table in TABLES.items():
        before, _, rest = DOCUMENT.read_text().partition(start)
        after = rest.partition(TABLE_END)[2]
        DOCUMENT.write_text(before + start + table() + TABLE_END + after)
    rows = [
        {"key": _key(source, ARCHITECTURES), **asdict(kernel)}
        for source in SOURCES
        for kernel in compile_kernels(source)
    ]
    with KEPT.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
