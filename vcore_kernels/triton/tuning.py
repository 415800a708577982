"""Settings of every kernel, by architecture: the one place to tune them.

Every line has been compiled ahead of time without spills and within the shared memory of its target
(benchmarks/results/aot.md). None has been timed yet: the reasons are read off that report and
arithmetic; `python benchmarks/gpu.py --tune` measures the alternatives on a device.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tiles:
    """A tiled matrix product: output tile rows x columns, depth a step of the inner loop."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    tma: bool = False  # operands by the bulk tensor copy engine where they are aligned
    parts: int = 1  # the results of a tile are taken in this many parts of its columns: 1, 2, 4
    programs: int = 1  # resident on a multiprocessor; the grid is persistent
    flatten: bool = True  # one loop over tiles and depth: the next tile loads while this one ends

    @property
    def part(self) -> int:
        """Columns of a part."""
        return self.columns // self.parts


# Where an architecture has no line of its own: float32 products are the same everywhere.
_INSTEAD = {"sm89": "sm80", "sm90": "sm80", "sm100": "sm80"}


def tiles(table: dict, architecture: str, dtype: torch.dtype, width: int, *products: str) -> Tiles:
    """The line of ``table`` for operands of ``dtype`` whose rows are ``width`` long."""
    key = (architecture, kind(dtype), *products)
    if key not in table:
        key = (_INSTEAD[architecture], *key[1:])
    if table[key].tma and not copy_engine_serves(width, dtype):
        if architecture == "interpreter":
            return replace(table[key], tma=False)
        key = ("unaligned", *key[1:])
    return table[key]


def copy_engine_serves(width: int, dtype: torch.dtype) -> bool:
    """It takes rows that are a multiple of 16 bytes apart; with 32 the other addresses fit too."""
    return width * dtype.itemsize % 32 == 0


def kind(dtype: torch.dtype) -> str:
    """The tables' key for the operands' dtype: half (bf16, fp16) or float."""
    return "float" if dtype == torch.float32 else "half"


# Rows of a chunk are a multiple of this, and so of every depth that runs over rows.
ROW_BLOCK = 128

# What the exponentials (or logit gradients) of one chunk may take. At N = 32768, V = 151936 that is
# 1/18.6 of the bf16 logits, and the products still are 1664 rows deep.
WORKSPACE = 512 << 20
# The statistics and gathered rows of a chunk without exponentials.
STATISTICS = 128 << 20


def elements(architecture: str) -> int:
    """Of a block of an elementwise kernel: 16 bytes of bf16 to each of 8 warps' threads, twice."""
    return 1 << 18 if architecture == "interpreter" else 4096


# Logits and their statistics. The last key says which products a tile is for:
#   one          hidden weight'
#   jvp, pair    and second hidden weight': two accumulators
#   ... + weight and hidden second weight': three products, more operands
# The column tile fixes the order of summation, so it depends on nothing else: a row's loss is the
# same in every batch.
LOGITS: dict[tuple[str, str, str], Tiles] = {
    # as few programs as possible: the interpreter takes milliseconds for each operation of each
    ("interpreter", "half", "one"): Tiles(64, 512, 64, 4, 1, tma=True, parts=4),
    ("interpreter", "half", "jvp"): Tiles(64, 512, 64, 4, 1, tma=True, parts=2),
    ("interpreter", "half", "pair"): Tiles(64, 512, 64, 4, 1, tma=True, parts=4),
    ("interpreter", "half", "jvp+weight"): Tiles(64, 256, 64, 4, 1, tma=True),
    ("interpreter", "half", "pair+weight"): Tiles(64, 256, 64, 4, 1, tma=True),
    ("interpreter", "float", "one"): Tiles(64, 512, 64, 4, 1, tma=True, parts=2),
    ("interpreter", "float", "jvp"): Tiles(64, 256, 64, 4, 1, tma=True),
    ("interpreter", "float", "pair"): Tiles(64, 256, 64, 4, 1, tma=True),
    ("interpreter", "float", "jvp+weight"): Tiles(64, 512, 64, 4, 1, tma=True, parts=4),
    ("interpreter", "float", "pair+weight"): Tiles(64, 512, 64, 4, 1, tma=True, parts=2),
    # The largest accumulator that leaves registers for a part of the results: 64 floats a thread.
    ("sm80", "half", "one"): Tiles(128, 128, 64, 8, 3, parts=2),
    ("sm80", "half", "jvp"): Tiles(128, 128, 32, 8, 3, parts=4),
    ("sm80", "half", "pair"): Tiles(128, 128, 32, 8, 3, parts=4),
    ("sm80", "half", "jvp+weight"): Tiles(128, 64, 64, 8, 2, parts=2),
    ("sm80", "half", "pair+weight"): Tiles(128, 64, 64, 8, 2, parts=2),
    # float32 without tensor cores keeps operands in registers too: small tiles everywhere.
    ("sm80", "float", "one"): Tiles(64, 64, 32, 4, 3),
    ("sm80", "float", "jvp"): Tiles(64, 64, 32, 8, 3, parts=2),
    ("sm80", "float", "pair"): Tiles(64, 64, 32, 8, 3, parts=2),
    ("sm80", "float", "jvp+weight"): Tiles(64, 32, 16, 4, 3),
    ("sm80", "float", "pair+weight"): Tiles(64, 32, 16, 4, 3),
    # As sm80, in 99 KiB of shared memory.
    ("sm89", "half", "one"): Tiles(128, 128, 32, 8, 3, parts=2),
    ("sm89", "half", "jvp"): Tiles(128, 128, 32, 8, 3, parts=4),
    ("sm89", "half", "pair"): Tiles(128, 128, 32, 8, 3, parts=4),
    ("sm89", "half", "jvp+weight"): Tiles(128, 64, 32, 8, 3, parts=2),
    ("sm89", "half", "pair+weight"): Tiles(128, 64, 32, 8, 3, parts=2),
    # wgmma at its widest, 64 x 256, from 3 buffers of 48 KiB; 128 floats of accumulator a thread
    # leave room for a quarter of the results at a time (halves spill under a soft cap).
    ("sm90", "half", "one"): Tiles(128, 256, 64, 8, 3, tma=True, parts=4),
    # Two accumulators of 64 floats. Flattened, ptxas waits after every wgmma of two chains (C7515).
    ("sm90", "half", "jvp"): Tiles(128, 128, 64, 8, 4, tma=True, parts=4, flatten=False),
    ("sm90", "half", "jvp+weight"): Tiles(128, 128, 64, 8, 3, tma=True, parts=4, flatten=False),
    # Five statistics a row: at 128 columns 32 bytes a thread spill.
    ("sm90", "half", "pair"): Tiles(128, 64, 64, 8, 4, tma=True, parts=2, flatten=False),
    ("sm90", "half", "pair+weight"): Tiles(128, 64, 64, 8, 3, tma=True, parts=2, flatten=False),
    # Without the copy engine the addresses of three buffers take the registers of half a tile. Odd
    # widths are rare: these are small enough for every architecture that has the engine.
    ("unaligned", "half", "one"): Tiles(128, 64, 32, 8, 3, parts=2),
    ("unaligned", "half", "jvp"): Tiles(64, 64, 32, 4, 2, parts=2),
    ("unaligned", "half", "pair"): Tiles(128, 64, 32, 8, 3, parts=2),
    ("unaligned", "half", "jvp+weight"): Tiles(64, 64, 32, 4, 2, parts=2),
    ("unaligned", "half", "pair+weight"): Tiles(64, 64, 32, 4, 2, parts=2),
    # Accumulators live in tensor memory; the limits are shared memory and the results' registers.
    ("sm100", "half", "one"): Tiles(128, 256, 64, 8, 3, tma=True, parts=4),
    # Flattened, Triton 3.7 compiles the three products of jvp+weight to an empty kernel.
    ("sm100", "half", "jvp"): Tiles(128, 128, 64, 8, 4, tma=True, parts=4),
    ("sm100", "half", "pair"): Tiles(128, 128, 64, 8, 4, tma=True, parts=4, flatten=False),
    ("sm100", "half", "jvp+weight"): Tiles(128, 128, 64, 8, 2, tma=True, parts=4, flatten=False),
    ("sm100", "half", "pair+weight"): Tiles(128, 128, 64, 8, 2, tma=True, parts=4, flatten=False),
    # 64 rows, parts, loops not flattened: otherwise scalar registers spill, and splitting a tile of
    # 128 columns takes 96 KiB of the 64 KiB of shared memory.
    ("gfx942", "half", "one"): Tiles(64, 128, 64, 8, 2, parts=4, flatten=False),
    ("gfx942", "half", "jvp"): Tiles(64, 64, 64, 8, 2, parts=2, flatten=False),
    ("gfx942", "half", "pair"): Tiles(64, 64, 64, 8, 2, parts=2, flatten=False),
    ("gfx942", "half", "jvp+weight"): Tiles(64, 64, 32, 8, 2, parts=2, flatten=False),
    ("gfx942", "half", "pair+weight"): Tiles(64, 64, 32, 8, 2, parts=2, flatten=False),
    ("gfx942", "float", "one"): Tiles(64, 64, 32, 8, 2, parts=2, flatten=False),
    ("gfx942", "float", "jvp"): Tiles(64, 64, 32, 8, 2, parts=2, flatten=False),
    ("gfx942", "float", "pair"): Tiles(64, 64, 32, 8, 2, parts=2, flatten=False),
    ("gfx942", "float", "jvp+weight"): Tiles(64, 64, 32, 8, 2, parts=2, flatten=False),
    ("gfx942", "float", "pair+weight"): Tiles(64, 64, 32, 8, 2, parts=2, flatten=False),
}

# Gradient of hidden: rows x H over the vocabulary.
HIDDEN_GRADIENT: dict[tuple[str, str], Tiles] = {
    ("interpreter", "half"): Tiles(64, 128, 512, 4, 1, tma=True, parts=2),
    ("interpreter", "float"): Tiles(64, 128, 512, 4, 1, tma=True),
    ("sm80", "half"): Tiles(128, 128, 64, 8, 3),
    ("sm80", "float"): Tiles(64, 64, 32, 4, 3),
    ("sm89", "half"): Tiles(128, 128, 32, 8, 3),
    ("sm90", "half"): Tiles(128, 256, 64, 8, 3, tma=True, parts=2),
    ("sm100", "half"): Tiles(128, 256, 64, 8, 3, tma=True, parts=2),
    ("unaligned", "half"): Tiles(128, 64, 32, 8, 3),
    ("gfx942", "half"): Tiles(128, 128, 64, 8, 2, flatten=False),
    ("gfx942", "float"): Tiles(64, 64, 32, 4, 2, flatten=False),
}

# Gradient of weight: V x H over the rows of a chunk.
WEIGHT_GRADIENT: dict[tuple[str, str], Tiles] = {
    ("interpreter", "half"): Tiles(512, 64, 64, 4, 1, tma=True, parts=2),
    ("interpreter", "float"): Tiles(512, 64, 64, 4, 1, tma=True),
    ("sm80", "half"): Tiles(128, 128, 64, 8, 3, parts=2),
    ("sm80", "float"): Tiles(64, 64, 32, 4, 3),
    ("sm89", "half"): Tiles(128, 128, 32, 8, 3, parts=2),
    ("sm90", "half"): Tiles(128, 256, 64, 8, 3, tma=True, parts=2),
    ("sm100", "half"): Tiles(128, 128, 64, 8, 4, tma=True, parts=2),
    ("unaligned", "half"): Tiles(64, 128, 32, 8, 3),
    ("gfx942", "half"): Tiles(128, 128, 64, 8, 2, flatten=False),
    ("gfx942", "float"): Tiles(64, 64, 32, 4, 2, flatten=False),
}

# Norm of a sequence's weight gradient by its tiles: V x H over the sequence's rows, which are
# filled up to a multiple of the depth. A program ends with its tile: short sequences take few
# steps, so that more stages hide the first loads.
NORM_PRODUCT: dict[tuple[str, str], Tiles] = {
    ("interpreter", "half"): Tiles(512, 128, 16, 4, 1, tma=True),
    ("interpreter", "float"): Tiles(512, 128, 16, 4, 1, tma=True),
    ("sm80", "half"): Tiles(128, 128, 64, 8, 3),
    ("sm80", "float"): Tiles(64, 64, 32, 4, 3),
    ("sm89", "half"): Tiles(128, 128, 32, 8, 3),
    ("sm90", "half"): Tiles(128, 256, 64, 8, 4, tma=True),
    ("sm100", "half"): Tiles(128, 256, 64, 8, 4, tma=True),
    ("unaligned", "half"): Tiles(64, 128, 32, 8, 3),
    ("gfx942", "half"): Tiles(128, 128, 64, 8, 2),
    ("gfx942", "float"): Tiles(64, 64, 32, 4, 2),
}

# The same by products of pairs of tokens: T x T over the vocabulary, and over H. Tiles are square.
NORM_GRAM: dict[tuple[str, str], Tiles] = {
    ("interpreter", "half"): Tiles(16, 16, 512, 4, 1, tma=True),
    ("interpreter", "float"): Tiles(16, 16, 512, 4, 1, tma=True),
    ("sm80", "half"): Tiles(128, 128, 64, 8, 3),
    ("sm80", "float"): Tiles(64, 64, 16, 4, 3),
    ("sm89", "half"): Tiles(128, 128, 32, 8, 3),
    ("sm90", "half"): Tiles(128, 128, 64, 8, 4, tma=True),
    ("sm100", "half"): Tiles(128, 128, 64, 8, 4, tma=True),
    ("gfx942", "half"): Tiles(128, 128, 64, 8, 2),
    ("gfx942", "float"): Tiles(64, 64, 32, 4, 2),
}

# ... and over H, times those over the vocabulary: little of the work. Square tiles that divide
# those, small ones, whose two tiles of sums fit into registers.
NORM_PAIRS: dict[tuple[str, str], Tiles] = {
    ("interpreter", "half"): Tiles(16, 16, 128, 4, 1, tma=True),
    ("interpreter", "float"): Tiles(16, 16, 128, 4, 1, tma=True),
    ("sm80", "half"): Tiles(64, 64, 64, 4, 3),
    ("sm80", "float"): Tiles(64, 64, 16, 4, 3),
    ("sm89", "half"): Tiles(64, 64, 64, 4, 3),
    ("sm90", "half"): Tiles(64, 64, 64, 4, 3, tma=True),
    ("sm100", "half"): Tiles(64, 64, 64, 4, 3, tma=True),
    ("unaligned", "half"): Tiles(64, 64, 32, 4, 3),
    ("gfx942", "half"): Tiles(64, 64, 64, 4, 2),
    ("gfx942", "float"): Tiles(64, 64, 32, 4, 2),
}


@dataclass(frozen=True)
class Perturb:
    rows: int  # blocks of 1024 entries of 16 bits a program; as many bytes of wider ones
    num_warps: int


# In-place perturbation is bound by memory: a thread takes 16 neighbouring bytes in each of four
# quarters of its blocks, and all its loads are under way before the first is needed.
_PERTURB = Perturb(rows=8, num_warps=8)
PERTURB = {
    "interpreter": Perturb(rows=64, num_warps=1),
    "sm80": _PERTURB,
    "sm89": _PERTURB,
    "sm90": _PERTURB,
    "sm100": _PERTURB,
    "gfx942": Perturb(rows=8, num_warps=4),  # 64 threads a warp: the same 16 bytes a thread
}


@dataclass(frozen=True)
class Gibbs:
    """Tokens that a program takes at a time."""

    block: int
    warps: int
    step_warps: int  # of the launches that search for one tau of the whole batch


# Keyed by architecture and dtype of the utilities. The order in which a segment is summed follows
# from these numbers. 4 float32 tokens a thread: with 8 float32 the compilers report
# 170 registers and one program of 8 warps on a multiprocessor; so two of them, and one searches
# while the other waits for memory.
GIBBS: dict[tuple[str, torch.dtype], Gibbs] = {
    (name, torch.float32): Gibbs(1024, 8, 8) for name in ("sm80", "sm89", "sm90", "sm100", "gfx942")
}
# 1 float64 token a thread: with more, 8 to 32 bytes spill around the called divisions.
for _name in ("sm90", "sm100", "gfx942"):
    GIBBS[_name, torch.float64] = Gibbs(512, 16, 16)
for _name in ("sm80", "sm89"):  # there the search spills 8 bytes with 16 warps, not with 8
    GIBBS[_name, torch.float64] = Gibbs(512, 16, 8)
# Each tile costs the interpreter the same whatever its size.
GIBBS["interpreter", torch.float32] = GIBBS["interpreter", torch.float64] = Gibbs(8192, 8, 8)


# ---- attention with a tangent ----


@dataclass(frozen=True)
class AttentionTile:
    """A block of queries, and how many keys a step of the inner loop takes."""

    rows: int
    keys: int
    warps: int
    stages: int
    values: int = 256  # columns of v that a program takes; each forms the scores again


# Keyed by architecture, kind, and the head's width padded to a power of two (at most the key). Two
# accumulators of rows x width and two tiles of scores live in registers, q and dq and `stages`
# tiles of k, dk, v, dv in shared memory.
ATTENTION: dict[tuple[str, str, int], AttentionTile] = {
    # Few programs; v in parts as on the GPUs, so that the tests go through them.
    ("interpreter", "half", 256): AttentionTile(128, 64, 4, 1, values=64),
    ("interpreter", "float", 256): AttentionTile(128, 64, 4, 1, values=64),
    # 16 rows a warp: more and they would be computed twice. With mma.sync q and dq live in
    # registers too (width / 2 a thread), so that beside width 128 only 16 keys and half of v fit,
    # and an eighth of v at 256.
    ("sm80", "half", 64): AttentionTile(64, 32, 4, 2),
    ("sm80", "half", 128): AttentionTile(128, 16, 8, 2, values=64),
    ("sm80", "half", 256): AttentionTile(128, 16, 8, 2, values=32),
    ("sm89", "half", 64): AttentionTile(64, 32, 4, 2),
    ("sm89", "half", 128): AttentionTile(128, 16, 8, 2, values=64),
    ("sm89", "half", 256): AttentionTile(64, 16, 8, 2, values=32),  # 146 KiB with 128 rows
    # wgmma reads q and dq from shared memory: two warpgroups of 64 rows, 255 registers at width
    # 128; at 256 the accumulators leave room for a quarter of v.
    ("sm90", "half", 64): AttentionTile(128, 64, 8, 2),
    ("sm90", "half", 128): AttentionTile(128, 32, 8, 2),
    ("sm90", "half", 256): AttentionTile(128, 32, 8, 2, values=64),
    # As sm90, but the accumulators pass through registers on the way to tensor memory and back:
    # with all of v at width 128 they spill. Shared memory is short at 256.
    ("sm100", "half", 64): AttentionTile(128, 64, 8, 2),
    ("sm100", "half", 128): AttentionTile(128, 32, 8, 2, values=64),
    ("sm100", "half", 256): AttentionTile(128, 16, 8, 2, values=64),
    # 512 registers a thread, 64 KiB of LDS: it is the LDS that limits keys and stages.
    ("gfx942", "half", 64): AttentionTile(64, 32, 4, 1),
    ("gfx942", "half", 128): AttentionTile(64, 32, 4, 1),
    ("gfx942", "half", 256): AttentionTile(64, 16, 4, 1, values=128),
    # float32 is multiplied without tensor cores, operands in registers: 32 rows or keys spill.
    **{
        (architecture, "float", width): AttentionTile(16, 16, width // 16, 2)
        for architecture in ("sm80", "sm89", "sm90", "sm100")
        for width in (64, 128)
    },
    ("gfx942", "float", 64): AttentionTile(64, 16, 4, 1),
    ("gfx942", "float", 128): AttentionTile(64, 16, 4, 1, values=64),
}


def attention_tile(architecture: str, dtype: torch.dtype, width: int) -> AttentionTile:
    """The settings for heads of ``width`` at most."""
    widths = [w for a, k, w in ATTENTION if (a, k) == (architecture, kind(dtype)) and w >= width]
    return ATTENTION[architecture, kind(dtype), min(widths)]
