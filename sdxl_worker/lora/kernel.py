"""The Triton kernel that merges low-rank changes into many weights of different shapes in one launch.

Plain Python until `triton.jit` compiles it, so that this module can be imported where there is no Triton, which torch's
CUDA wheels bring along; where there is, that takes half a second, so that it waits until the kernel is needed. `fused`
has the layout of the table. Written for Triton 3.6 and newer, without the functions of Triton's own library that are
compiled themselves (cdiv, zeros): with them the interpreter would need a process of its own.
"""

from __future__ import annotations

from typing import Any

try:
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # a CPU build of torch
    tl: Any = None  # type: ignore[no-redef]


# The arguments: `table` (int64), the rows of the modules, and from element `parts_at` on those of the parts; `tiles`
# (int32), the module of each program. WEIGHT: the weights' dtype; DTYPES: which factor dtypes may occur; ALIGNED: all
# addresses of weights are divisible by 16 and all widths by 8; SIDE: of a tile; DEPTH: how much of the rank at a time.
# The columns of a channels_last convolution are (tap, channel) in memory and (channel, tap) in `down`. No tensor has
# 2**31 elements: offsets are int32. `live` may be `pristine`.
def merge_tiles(  # noqa: C901  (what it calls would have to be compiled beforehand)
    table, tiles, parts_at, WEIGHT: constexpr, DTYPES: constexpr, ALIGNED: constexpr, SIDE: constexpr, DEPTH: constexpr
):
    """live = round(pristine + sum of strength * up @ down), one tile of one module per program, summed in float32."""
    program = tl.program_id(0)
    module = table + tl.load(tiles + program) * 8
    live_address, pristine_address = tl.load(module), tl.load(module + 1)
    rows, columns = tl.load(module + 2).to(tl.int32), tl.load(module + 3).to(tl.int32)
    taps, tile = tl.load(module + 4).to(tl.int32), program - tl.load(module + 5).to(tl.int32)
    first_part, last_part = tl.load(module + 6).to(tl.int32), tl.load(module + 7).to(tl.int32)
    if ALIGNED:
        columns = tl.multiple_of(columns, 8)
    across = (columns + SIDE - 1) // SIDE
    m = (tile // across) * SIDE + tl.arange(0, SIDE)
    n = (tile % across) * SIDE + tl.arange(0, SIDE)
    within_m, within_n = m < rows, n < columns
    at = m[:, None] * columns + n[None, :]
    inside = within_m[:, None] & within_n[None, :]
    live = live_address.to(tl.pointer_type(WEIGHT))
    pristine = pristine_address.to(tl.pointer_type(WEIGHT))
    if ALIGNED:
        # Of the pointers: what is known of an integer is lost when it becomes one.
        live, pristine = tl.multiple_of(live, 16), tl.multiple_of(pristine, 16)
    # Asked for first: it is under way while the factors are multiplied.
    weight = tl.load(pristine + at, mask=inside, other=0.0)
    channels = columns // taps
    n_of_down = (n % channels) * taps + n // channels
    change = tl.full((SIDE, SIDE), 0.0, dtype=tl.float32)
    for index in range(first_part, last_part):
        part = table + parts_at + index * 5
        up_address, down_address = tl.load(part), tl.load(part + 1)
        rank, dtype = tl.load(part + 2).to(tl.int32), tl.load(part + 4)
        strength = tl.load(part + 3).to(tl.int32).to(tl.float32, bitcast=True)
        for begin in range(0, rank, DEPTH):
            k = begin + tl.arange(0, DEPTH)
            of_up, of_down = m[:, None] * rank + k[None, :], k[:, None] * columns + n_of_down[None, :]
            in_up, in_down = within_m[:, None] & (k < rank)[None, :], (k < rank)[:, None] & within_n[None, :]
            # Two levels: the outer one is decided when the kernel is compiled.
            if DTYPES & 1:  # noqa: SIM102
                if dtype == 1:
                    up = tl.load(up_address.to(tl.pointer_type(tl.float16)) + of_up, mask=in_up, other=0.0)
                    down = tl.load(down_address.to(tl.pointer_type(tl.float16)) + of_down, mask=in_down, other=0.0)
                    change += strength * tl.dot(up, down)
            if DTYPES & 2:  # noqa: SIM102
                if dtype == 2:
                    up = tl.load(up_address.to(tl.pointer_type(tl.bfloat16)) + of_up, mask=in_up, other=0.0)
                    down = tl.load(down_address.to(tl.pointer_type(tl.bfloat16)) + of_down, mask=in_down, other=0.0)
                    change += strength * tl.dot(up, down)
            if DTYPES & 4:  # noqa: SIM102
                if dtype == 4:
                    up = tl.load(up_address.to(tl.pointer_type(tl.float32)) + of_up, mask=in_up, other=0.0)
                    down = tl.load(down_address.to(tl.pointer_type(tl.float32)) + of_down, mask=in_down, other=0.0)
                    # Not in TF32, whose ten bits of mantissa would be seen in the weights.
                    change += strength * tl.dot(up, down, input_precision="ieee")
    tl.store(live + at, (weight.to(tl.float32) + change).to(WEIGHT), mask=inside)
