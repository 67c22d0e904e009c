"""`recycle._carriers` as kernels: all rows at once, whatever their numbers of tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from catp_lightning.methods.precision import without_autocast
from catp_lightning.methods.selectors.kernels import OPTIONS, blocks, tiles
from catp_lightning.methods.selectors.similarity import whole_bits
from catp_lightning.utils.on_cpu import on_cpu


def run(vectors: Tensor, rank: Tensor, parts: Tensor) -> Tensor:
    """Return what `recycle._carriers` returns: int64 [R, T]."""
    rows, tokens, width = vectors.shape
    longest, clusters = (max(1, value) for value in on_cpu(parts)[0][1:].amax(1).tolist())
    carriers, recycled = torch.empty_like(rank), rank.new_empty(rows, longest, dtype=torch.int32)
    _list[(rows,)](rank, parts, carriers, recycled, rows, tokens, longest, **blocks(tokens))
    largest, whole = vectors.new_empty(rows, longest), vectors.new_empty(rows, longest, width, dtype=torch.float64)
    squares, steps = whole.new_empty(rows, longest), whole.new_empty(rows)
    given = (vectors.contiguous(), recycled, parts, largest)
    _largest[(rows, longest)](*given, rows, tokens, longest, width, BLOCK=1024, **OPTIONS)
    bits = whole_bits(width)
    others = triton.next_power_of_2(longest)
    _whole[(rows, longest)](
        *given, whole, squares, steps, rows, tokens, longest, width, bits, BLOCK=1024, OTHERS=others, **OPTIONS
    )
    with without_autocast(whole):
        products = whole @ whole.mT
    apart = (squares[:, None] + squares[..., None]).sub_(products, alpha=2).sqrt_()
    apart = apart.mul_(steps[:, None, None]).div_(width**0.5)
    apart.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = apart.topk(min(clusters, max(1, longest - 1)), largest=False).values
    last = (rows, tokens, longest, nearest.shape[2])
    _join[(rows,)](apart, nearest, squares, parts, recycled, carriers, *last, **tiles(longest))
    return carriers


@triton.jit(do_not_specialize=["rows", "tokens", "longest"])
def _list(rank, parts, carriers, recycled, rows, tokens, longest, BLOCK: tl.constexpr):
    """List the tokens of a row that are recycled; of the others those that are kept carry themselves."""
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there, kept = place < tokens, tl.load(parts + row)
    own = tl.load(rank + row * tokens + place, mask=there, other=tokens)
    tl.store(carriers + row * tokens + place, tl.where(own < kept, place, -1), mask=there)
    listed = there & (own >= kept) & (own < kept + tl.load(parts + rows + row))
    tl.store(recycled + row * longest + tl.cumsum(listed.to(tl.int32), 0) - 1, place, mask=listed)


@triton.jit(do_not_specialize=["rows", "tokens", "longest", "width"])
def _largest(vectors, recycled, parts, largest, rows, tokens, longest, width, BLOCK: tl.constexpr):
    """Find the largest absolute value of each listed vector; infinity where one is no number, or none is listed."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1)
    found = tl.full((BLOCK,), float("inf"), vectors.dtype.element_ty)
    if at < tl.load(parts + rows + row):
        vectors += (row * tokens + tl.load(recycled + row * longest + at)) * width
        found = tl.zeros_like(found)
        for start in range(0, width, BLOCK):
            place = start + tl.arange(0, BLOCK)
            value = tl.abs(tl.load(vectors + place, mask=place < width, other=0.0))
            found = tl.maximum(found, tl.where(value < float("inf"), value, float("inf")))
    tl.store(largest + row * longest + at, tl.max(found, 0))


@triton.jit(do_not_specialize=["rows", "tokens", "longest", "width", "bits"])
def _whole(
    vectors,
    recycled,
    parts,
    largest,
    whole,  # float64 [R, N, D]: coordinates of the listed vectors as numbers of steps
    squares,  # float64 [R, N]: sums of their squares, infinity for vectors that are not finite
    steps,  # float64 [R]: the row's step, a power of two
    rows,
    tokens,
    longest,
    width,
    bits,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    row, at, others = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, OTHERS)
    row_largest = tl.load(largest + row * longest + others, mask=others < longest, other=0.0)
    scale = tl.max(tl.where(row_largest < float("inf"), row_largest, 0.0), 0).to(tl.float64)
    exponent = ((scale.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1022  # scale is 2^exponent times 0.5 to 1
    step = ((tl.maximum(exponent - bits, -900) + 1023) << 52).to(tl.float64, bitcast=True)
    tl.store(steps + row, step, mask=at == 0)
    finite = tl.load(largest + row * longest + at) < float("inf")
    token = tl.load(recycled + row * longest + at, mask=finite, other=0)
    known = tl.where(finite, width, 0)
    vectors += (row * tokens + token) * width
    whole += (row * longest + at) * width
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(vectors + place, mask=place < known, other=0.0).to(tl.float64) / step
        rounded = (value + 6755399441055744.0) - 6755399441055744.0  # 1.5 * 2^52: to the nearest, of two the even one
        tl.store(whole + place, rounded, mask=place < width)
        total += rounded * rounded
    tl.store(squares + row * longest + at, tl.where(finite, tl.sum(total, 0), float("inf")))


@triton.jit(do_not_specialize=["rows", "tokens", "longest", "listed"])
def _join(
    apart,  # float64 [R, N, N], infinity on the diagonal
    nearest,  # float64 [R, N, K], the smallest of each, in ascending order
    density,  # float64 [R, N], overwritten
    parts,
    recycled,
    carriers,
    rows,
    tokens,
    longest,
    listed,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Find the centres of a row's clusters, and let the nearest of them carry each listed token."""
    row, place, some = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, AT_ONCE)
    count, clusters = tl.load(parts + rows + row), tl.load(parts + 2 * rows + row)
    there, start = place < count, row * longest
    neighbours = tl.maximum(tl.minimum(clusters, count - 1), 1)
    squared = tl.zeros((BLOCK,), tl.float64)
    for one in range(neighbours):
        value = tl.load(nearest + (start + place) * listed + one, mask=there, other=0.0)
        squared += value * value
    dense = -(squared / neighbours.to(tl.float64))
    tl.store(density + start + place, dense, mask=there)
    tl.debug_barrier()
    away, farthest = tl.full((BLOCK,), float("inf"), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, AT_ONCE):
        other = (first + some)[:, None]
        pairs = (other < count) & there[None] & (other != place[None])
        own = tl.load(apart + (start + other) * longest + place[None], mask=pairs, other=0.0)
        theirs = tl.load(density + start + other, mask=other < count, other=0.0)
        denser = (theirs > dense[None]) | ((theirs == dense[None]) & (other < place[None]))
        away = tl.minimum(away, tl.min(tl.where(pairs & denser, own, float("inf")), 0))
        farthest = tl.maximum(farthest, tl.max(own, 0))
    away = tl.minimum(away, tl.max(farthest, 0))  # where no token is denser: the largest distance
    peak = tl.where(dense > float("-inf"), dense + tl.log(away), float("-inf"))
    free, near = there, tl.full((BLOCK,), float("inf"), tl.float64)
    centre = tl.full((BLOCK,), BLOCK, tl.int32)
    for _ in range(clusters):
        most = tl.max(tl.where(free, peak, float("-inf")), 0)
        best = tl.min(tl.where(free & (peak == most), place, BLOCK), 0)
        free = free & (place != best)
        own = tl.load(apart + (start + best) * longest + place, mask=there, other=0.0)
        own = tl.where(place == best, -1.0, own)  # a centre is its own
        centre = tl.where((own < near) | ((own == near) & (best < centre)), best, centre)
        near = tl.minimum(near, own)
    token = tl.load(recycled + start + place, mask=there, other=0)
    carrier = tl.load(recycled + start + centre, mask=there, other=0)
    tl.store(carriers + row * tokens + token, carrier, mask=there)
