"""Floating-point operations and bytes of each kernel launch, for Triton's Proton.

Each function here is the ``launch_metadata`` of one kernel, which Triton calls only while a launch
hook is set (``proton.start(..., hook="triton")``): from the launch's arguments it makes the name in
the profile's tree, with the sizes, and the metrics ``flops<bits of the operands>`` and ``bytes``.
Only products are counted as operations, a multiplication and an addition as two; of kernels
without products the bytes tell all. Bytes are what a launch reads and writes at least, each entry
once: what a cache does not keep comes on top. Left out is what a kernel reads and writes once for a
row, a sequence or a tile (indices, targets, statistics, partial sums), beside matrices next to
nothing; in ``row_statistics``, which has no matrix, the statistics of tiles are counted, and what
it writes for each row is not. How many rows of a chunk are ignored or have weight
0 is known on the device alone, so both figures are those of a full chunk, up to the last token.
"""

from collections.abc import Callable
from typing import Any

Arguments = dict[str, Any]
Metadata = Callable[[Any, Any, Arguments], dict[str, Any]]


def _bits(x: Any) -> int:
    """Of an entry of a tensor or a tensor descriptor."""
    return getattr(x, "base", x).dtype.itemsize * 8


def _size(x: Any) -> int:
    """Bytes of an entry; 0 for an argument that is left out."""
    return 0 if x is None else _bits(x) // 8


def _cost(what: Callable[[Arguments], tuple[str, int, int, Any]]) -> Metadata:
    """The hook from ``what``: sizes as text, operations, bytes, an operand of the products."""

    def metadata(grid: Any, compiled: Any, args: Arguments) -> dict[str, Any]:
        sizes, flops, moved, operand = what(args)
        found: dict[str, Any] = {"name": f"{compiled.name} [{sizes}]", "bytes": moved}
        if flops:
            found[f"flops{_bits(operand)}"] = flops
        return found

    metadata.__doc__ = what.__doc__
    return metadata


def _rows(args: Arguments, order: Any) -> int:
    """Rows of the chunk that tokens are left for; ``order`` has a place more than tokens."""
    return max(0, min(args["R"], order.numel() - 1 - args["o_chunk"]))


@_cost
def logit_tiles(a):
    """One product; of a jvp or a pair two, with a second weight three."""
    r, v, h = _rows(a, a["p_order"]), a["V"], a["H"]
    products = 1 + (a["p_second_hidden"] is not None) + (a["p_second_weight"] is not None)
    weights = 1 + (a["p_second_weight"] is not None)
    lefts = sum(a[f"p_{name}hidden"] is not None for name in ("", "second_", "right_"))
    moved = (weights * v + lefts * r) * h * _size(a["p_hidden"]) + r * v * _size(a["p_kept"])
    return f"{a['MODE']} R={r} V={v} H={h}", 2 * products * r * v * h, moved, a["p_hidden"]


@_cost
def row_statistics(a):
    r, tiles = _rows(a, a["p_index"]), a["tiles"]
    read = ("p_max", "p_sum", "p_moment", "p_second_max", "p_second_sum")
    moved = r * tiles * sum(_size(a[name]) for name in read)
    return f"R={r} tiles={tiles}", 0, moved, None


@_cost
def gather_rows(a):
    r, h = _rows(a, a["p_index"]), a["H"]
    entry = _size(a["p_from"]) + _size(a["p_minus"]) + _size(a["p_to"])
    return f"R={r} H={h}", 0, r * h * entry, None


@_cost
def logit_gradients(a):
    r, v = _rows(a, a["p_index"]), a["V"]
    return f"R={r} V={v}", 0, 2 * r * v * _size(a["p_kept"]), None


@_cost
def hidden_gradient(a):
    r, v, h = _rows(a, a["p_order"]), a["V"], a["H"]
    size, written = _size(a["p_gradient"]), r * h * _size(a["p_out"]) * a["splits"]
    moved = (r * v + v * h) * size + written
    return f"R={r} V={v} H={h} splits={a['splits']}", 2 * r * v * h, moved, a["p_gradient"]


@_cost
def add_splits(a):
    r, h = _rows(a, a["p_order"]), a["H"]
    moved = r * h * (a["splits"] * _size(a["p_sums"]) + _size(a["p_out"]))
    return f"R={r} H={h} splits={a['splits']}", 0, moved, None


@_cost
def weight_gradient(a):
    """The number of tokens is not among its arguments: a whole chunk is counted."""
    r, v, h = a["R"], a["V"], a["H"]
    accesses = 1 if a["FIRST"] else 2
    moved = (r * v + r * h) * _size(a["p_gradient"]) + accesses * v * h * _size(a["p_out"])
    return f"R={r} V={v} H={h}", 2 * r * v * h, moved, a["p_gradient"]


@_cost
def bias_gradient(a):
    r, v = a["R"], a["V"]
    accesses = 1 if a["FIRST"] else 2
    return f"R={r} V={v}", 0, r * v * _size(a["p_gradient"]) + accesses * v * 4, None


@_cost
def scale_cast(a):
    n, h = a["N"], a["H"]
    return f"N={n} H={h}", 0, n * h * (_size(a["p_x"]) + _size(a["p_out"])), None


@_cost
def squares_of_products(a):
    r, v, h = a["R"], a["V"], a["H"]
    moved = (r * v + r * h) * _size(a["p_gradient"])
    return f"R={r} V={v} H={h}", 2 * r * v * h, moved, a["p_gradient"]


def _lower_tiles(a) -> tuple[int, int]:
    """(sequences, entries of a gram in the square tiles on and below its diagonal)."""
    tiles = a["L"] // a["ROWS"]
    return a["p_starts"].numel() - 1, tiles * (tiles + 1) // 2 * a["ROWS"] ** 2


@_cost
def gram_of_gradients(a):
    (number, entries), v = _lower_tiles(a), a["V"]
    accesses = 1 if a["FIRST"] else 2
    moved = a["R"] * v * _size(a["p_gradient"]) + accesses * number * entries * 4
    return f"S={number} L={a['L']} V={v}", 2 * number * entries * v, moved, a["p_gradient"]


@_cost
def squares_of_grams(a):
    (number, entries), h = _lower_tiles(a), a["H"]
    moved = a["R"] * h * _size(a["p_hidden"]) + number * entries * 4
    return f"S={number} L={a['L']} H={h}", 2 * number * entries * h, moved, a["p_hidden"]


@_cost
def root_of_sums(a):
    moved = a["p_out"].numel() * (a["tiles"] + 1) * 4
    return f"S={a['p_out'].numel()} tiles={a['tiles']}", 0, moved, None


@_cost
def attention(a):
    """Six products with tangents of all three, for each pair of a query and a key that it sees.
    Packed and padded texts count as one text of full length."""
    batch, heads, length, width = a["p_q"].shape
    values = a["p_v"].shape[-1]
    pairs = length * (length + 1) // 2 if a["CAUSAL"] else length * length
    window = a["window"] if a["WINDOW"] else 0
    if 0 < window < length:
        pairs = window * (window + 1) // 2 + (length - window) * window
    given = {name: a[f"p_d{name}"] is not None for name in "qkv"}
    scores = 1 + given["q"] + given["k"]
    per_pair = scores * width + (1 + (scores > 1) + given["v"]) * values
    flops = 2 * batch * heads * pairs * per_pair
    read = ("p_q", "p_dq", "p_k", "p_dk", "p_v", "p_dv", "p_out", "p_dout")
    moved = sum(x.numel() * _size(x) for x in map(a.get, read) if x is not None)
    return f"B={batch} heads={heads} T={length} D={width}", flops, moved, a["p_q"]


@_cost
def gibbs(a):
    """One read of the utilities and masks; a budget's search reads them again, from cache."""
    n, number = a["p_s"].numel(), a["number"]
    outputs = _size(a["p_q"]) + _size(a["p_weight"])
    return f"N={n} S={number}", 0, n * (_size(a["p_s"]) + _size(a["p_mask"]) + outputs), None


@_cost
def gibbs_batch(a):
    n = a["p_s"].numel()
    return f"N={n} S={a['number']}", 0, n * (_size(a["p_s"]) + _size(a["p_mask"])), None


@_cost
def perturb(a):
    """Reads parameter and direction, writes parameter and backup."""
    size, entry = a["size"], 2 * _size(a["p_theta"]) + _size(a["p_g"]) + _size(a["p_saved"])
    return f"size={size}", 0, size * entry, None
