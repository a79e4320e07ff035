from pathlib import Path

BASE = str(Path(__file__).parent / "base_src")
NEW = str(Path(__file__).parents[4] / "csrc" / "cuda")
B = (528, 264, 1056, 2112)
ALL = [(c, b) for c in (14, 7) for b in B]
C14 = [(14, b) for b in B]
C7 = [(7, b) for b in B]
def consts(fs=None, bs=None, fh=None, bh=None, most=None):
    """Stages are (stride 1, stride 2) in units of bytes / 2."""
    r = []
    def stages(pair): return f"(stride == 1 ? {2 * pair[0]} : {2 * pair[1]}) / static_cast<int>(sizeof(T))"
    if fs: r.append((r"\(stride == 1 \? 8 : 6\) / static_cast<int>\(sizeof\(T\)\)", stages(fs)))
    if bs: r.append((r"\(stride == 1 \? 10 : 4\) / static_cast<int>\(sizeof\(T\)\)", stages(bs)))
    h = fh or bh
    if h: r.append((r"constexpr int kHeldBlocks = 2;", f"constexpr int kHeldBlocks = stride == 1 ? {h[0]} : {h[1]};"))
    if most: r.append((r"constexpr int kMostColumns = 14;", f"constexpr int kMostColumns = {most};"))
    return r
VARIANTS = [
    dict(name="base", source=BASE, fplans=[(7, 1056), (14, 1056)], bplans=[(14, 1056), (7, 1056)]),
    dict(name="new", source=NEW, fplans=ALL, bplans=ALL),
    dict(name="f-stages3-2", source=NEW, passes="f", replace=consts(fs=(3, 2)), fplans=C14),
    dict(name="f-stages6-4", source=NEW, passes="f", replace=consts(fs=(6, 4)), fplans=C14),
    dict(name="f-3blocks", source=NEW, passes="f", replace=consts(fh=(3, 3)), fplans=C14),
    dict(name="f-narrow-4blocks", source=NEW, passes="f", replace=consts(fh=(4, 4), most=7), fplans=C7),
    dict(name="f-narrow-5blocks", source=NEW, passes="f", replace=consts(fh=(5, 5), most=7), fplans=C7),
    dict(name="b-stages4-3", source=NEW, passes="b", replace=consts(bs=(4, 3)), bplans=C14),
    dict(name="b-narrow-3blocks", source=NEW, passes="b", replace=consts(bh=(3, 3), most=7), bplans=C7),
    dict(name="b-stages3-3", source=NEW, passes="b", replace=consts(bs=(3, 3)), bplans=C14),
    dict(name="b-narrow-4blocks", source=NEW, passes="b", replace=consts(bh=(4, 4), most=7), bplans=C7),
]
