"""Builds the benchmark: gen.py [jobs]. Variants are copies of csrc/cuda with constants replaced."""
import re, shutil, subprocess, sys
from pathlib import Path
here = Path(__file__).parent
sys.path.insert(0, str(here))
from config import VARIANTS
build = here / "build"
build.mkdir(exist_ok=True)
NVCC = ["nice", "-n", "10", "nvcc", "-std=c++17", "-O3", "-arch=sm_90", "-Xptxas", "-v"]
report = []
def make(name, source, replacements, passes):
    ns = "v_" + re.sub(r"\W", "_", name)
    d = build / ns
    (d / "csrc").mkdir(parents=True, exist_ok=True)
    texts = {}
    for f in Path(source).glob("*"):
        if f.suffix not in (".cu", ".cuh", ".h") or f.name.startswith(("expand", "reduce", "walk", "stream")): continue
        texts[f.name] = f.read_text().replace("moat_kernels", ns)
    used = set()
    for old, new in replacements:
        for n in texts:
            if re.search(old, texts[n]): used.add(old); texts[n] = re.sub(old, new, texts[n])
    missing = [old for old, _ in replacements if old not in used]
    assert not missing, (name, missing)
    t = texts["launch.cuh"]
    t = re.sub(r"  switch \(type\) \{.*?\n  \}\n", "  return function(__nv_bfloat16{});\n", t, flags=re.S)
    texts["launch.cuh"] = t
    texts["glue.cu"] = f'''#include "cuda/launchers.h"
namespace {ns}::cuda {{
static DepthwiseShape shape_of(int size, int out, int channels, int stride, int top, int batch) {{
  DepthwiseShape s; s.images = batch; s.height = s.width = size; s.out_height = s.out_width = out; s.stride = stride; s.top = s.left = top; s.channels = channels; return s; }}
int64_t run_forward(int size, int out, int channels, int stride, int top, int batch, const void* z1, const float* affine, const float* taps, void* z2, float* partials, int blocks, int columns) {{
  auto s = shape_of(size, out, channels, stride, top, batch); BlockPlan plan{{blocks, columns}};
  int status = depthwise_forward(s, Element::bfloat16, z1, {{affine, affine + channels, Activation::gelu}}, taps, {{nullptr, Activation::identity}}, z2, partials, plan, nullptr);
  return status ? -status : depthwise_forward_partials(s, plan); }}
int64_t run_backward(int size, int out, int channels, int stride, int top, int batch, const void* dy2, const void* z2, const float* factors, const void* z1, const float* affine, const float* taps, void* dpre, float* partials, int blocks, int columns) {{
  auto s = shape_of(size, out, channels, stride, top, batch); BlockPlan plan{{blocks, columns}};
  int status = depthwise_backward(s, Element::bfloat16, dy2, {{z2, factors, factors + channels, factors + 2 * channels}}, z1, {{affine, affine + channels, Activation::gelu}}, taps, dpre, partials, plan, nullptr);
  return status ? -status : depthwise_backward_partials(s, plan); }}
}}
'''
    if "f" not in passes: texts["glue.cu"] = re.sub(r"int64_t run_forward.*?\}\n(?=int64_t run_back)", "", texts["glue.cu"], flags=re.S)
    if "b" not in passes: texts["glue.cu"] = re.sub(r"int64_t run_backward.*?; \}\n(?=\})", "", texts["glue.cu"], flags=re.S)
    inc = d / "csrc" / "cuda"; inc.mkdir(exist_ok=True)
    objects = []
    files = ["glue.cu"] + (["depthwise_forward.cu"] if "f" in passes else []) + (["depthwise_backward.cu"] if "b" in passes else [])
    # Only GELU inside, identity outside.
    for n, t in texts.items():
        if n == "depthwise_forward.cu":
            t = re.sub(r"return arguments\.epilogue\.activation == Activation::gelu\s*\? launch_forward<T, activation, Activation::gelu>\(arguments, stream\)\s*: ", "return ", t)
            t = re.sub(r"return prologue\.activation == Activation::gelu\s*\? (launch_forward<T, Activation::gelu>\(arguments, stream\))\s*: [^;]*;", r"return \1;", t)
        if n == "depthwise_backward.cu":
            t = re.sub(r"return prologue\.activation == Activation::gelu\s*\? (launch_backward<T, Activation::gelu>\(arguments, stream\))\s*: [^;]*;", r"return \1;", t)
        texts[n] = t
    for n, t in texts.items():
        if not (inc / n).exists() or (inc / n).read_text() != t: (inc / n).write_text(t)
    stamp = "\0".join(texts[n] for n in sorted(texts)) 
    for f in files:
        o = d / (f + ".o"); objects.append(o)
        key = d / (f + ".key")
        log = d / (f + ".log")
        if not (o.exists() and key.exists() and key.read_text() == stamp):
            r = subprocess.run([*NVCC, f"-I{d/'csrc'}", "-c", str(inc / f), "-o", str(o)], capture_output=True, text=True)
            if r.returncode: print(name, r.stderr); raise SystemExit(1)
            log.write_text(r.stderr); key.write_text(stamp)
        for m in re.finditer(r"entry function '\w*?(forward|backward)_kernel\w*?Li(\d)E.*?(\d+) bytes spill stores.*?Used (\d+) registers.*?(\d+) bytes smem", log.read_text(), re.S):
            report.append(f"{name:24} {m[1]:8} s{m[2]} regs {m[4]} spill {m[3]} smem {m[5]}")
    return ns, objects
objects, decl, rows = [], [], []
for v in VARIANTS:
    passes = v.get("passes", "fb")
    ns, o = make(v["name"], v["source"], v.get("replace", []), passes)
    objects += o
    F = "int size, int out, int channels, int stride, int top, int batch, const void* z1, const float* affine, const float* taps, void* z2, float* partials, int blocks, int columns"
    B = "int size, int out, int channels, int stride, int top, int batch, const void* dy2, const void* z2, const float* factors, const void* z1, const float* affine, const float* taps, void* dpre, float* partials, int blocks, int columns"
    decl.append(f"namespace {ns}::cuda {{ int64_t run_forward({F}); int64_t run_backward({B}); }}")
    plans = lambda p: "{" + ", ".join(f"{{{c}, {b}}}" for c, b in p) + "}"
    rows.append(f'  {{"{v["name"]}", {f"{ns}::cuda::run_forward" if "f" in passes else "nullptr"}, {f"{ns}::cuda::run_backward" if "b" in passes else "nullptr"}, {v.get("stride", 0)}, {plans(v.get("fplans", []))}, {plans(v.get("bplans", []))}}},')
text = (here / "variants_head.h").read_text() + "\n".join(decl) + "\ninline std::vector<Variant> variants() { return {\n" + "\n".join(rows) + "\n}; }\n"
(here / "variants.h").write_text(text)
r = subprocess.run(["nice", "nvcc", "-std=c++17", "-O2", "-arch=sm_90", "-cudart", "static", "-Xcompiler", "-static-libstdc++", "-Xcompiler", "-static-libgcc", str(here / "main.cu"), *map(str, objects), "-o", str(here / "stencil_bench")], capture_output=True, text=True)
print(r.stderr[:3000]); print("\n".join(report))
