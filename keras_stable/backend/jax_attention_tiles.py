"""What the kernels of `jax_attention` share: logits, masks, loops, loads.

A kernel's program owns a block of queries (or of keys) and visits blocks of
keys (or queries). B batch, T time, N query heads, K key heads, H head
dimension; Q queries of a block, S keys of a block.

Exponents are of base 2, log2(e) being part of the scale: what is called z here
is log2(e) times the logit. Scores are the bare products q k^T.
"""

import dataclasses
import math

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LOG2E = math.log2(math.e)
# Of a logit that is invisible, and the maximum of none: finite, so that no
# difference of two is NaN; 2 to its power is 0.
LOW = -1e30


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries and keys of a block, and how the kernel is compiled."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


# By head size up to which they serve, and pass. Without spilled registers, and
# where it can be with two programs or more at once in a multiprocessor, so that
# one multiplies while another's exponentials are waited for.
HOPPER = {
    64: {
        # Measured on an H200: 0.64 ms; 128 queries 0.68.
        "forward": Blocks(64, 64, warps=4, stages=3),
        "dq": Blocks(64, 64),
        "dkv": Blocks(64, 64),
    },
    128: {
        "forward": Blocks(64, 64),
        "dq": Blocks(64, 64),
        "dkv": Blocks(32, 64),
    },
    256: {
        "forward": Blocks(64, 32),
        # Of 30 each, the fastest on an H200, with a cap and without.
        "dq": Blocks(128, 32, warps=8, stages=3),
        "dkv": Blocks(64, 32),
    },
}
# What runs everywhere, in 99 kB of shared memory.
SAFE = {
    64: dict.fromkeys(("forward", "dq", "dkv"), Blocks(64, 64)),
    128: dict.fromkeys(("forward", "dq", "dkv"), Blocks(32, 32)),
    256: dict.fromkeys(("forward", "dq", "dkv"), Blocks(32, 32, stages=1)),
}
# The same for numbers of four bytes.
SAFE_FLOAT32 = {
    128: dict.fromkeys(("forward", "dq", "dkv"), Blocks(32, 32, stages=1)),
    256: dict.fromkeys(("forward", "dq", "dkv"), Blocks(16, 16, stages=1)),
}
# Marketing names of what `HOPPER` was made for.
HOPPERS = ("H100", "H200", "H800", "H20", "GH200")


def blocks_of(name, length, head_size, dtype, card):
    """The `Blocks` of a pass, none longer than the sequence.

    Args:
        name: `"forward"`, `"dq"` or `"dkv"`.
        length, head_size: int.
        dtype: of queries and keys.
        card: `device_kind` of JAX's device.
    """
    if jnp.dtype(dtype).itemsize > 2:
        table = SAFE_FLOAT32
    elif any(word in HOPPERS for word in card.split()):
        table = HOPPER
    else:
        table = SAFE
    found = table[min(size for size in table if head_size <= size)][name]
    # Tensor cores multiply sixteen rows at least.
    most = max(16, pl.next_power_of_2(length))
    return dataclasses.replace(
        found,
        queries=min(found.queries, most),
        keys=min(found.keys, most),
    )


@dataclasses.dataclass(frozen=True)
class Formula:
    """What is computed, of numbers known when it is compiled.

    Attributes:
        scale: float >= 0.
        cap: float or None.
        clip: `(gamma, zeta)` or None.
        window: int or None.
        interpret: bool. Without a GPU, and without its instructions.
    """

    scale: float
    cap: float | None = None
    clip: tuple[float, float] | None = None
    window: int | None = None
    interpret: bool = False

    def exp2(self, x):
        """`2 ** x`, relative error 2^-22; what is below 2^-126 is 0."""
        if self.interpret:
            return jnp.exp2(x)
        return _instructions("ex2.approx.ftz.f32 $0, $1;", x)

    def tanh_half(self, scores):
        """`(1 - tanh(scale * scores / cap)) / 2`, between 0 and 1.

        As `1 / (1 + exp2(2 log2(e) x))`, x at most some 20: beyond it tanh is
        1. The absolute error of tanh is at most 1e-6, so that of a logit 1e-6
        cap. (The GPU's own tanh.approx.f32 errs by 2^-11 relative: by 2 % of
        a probability whose logit is 50.)
        """
        x = scores * (2 * LOG2E * self.scale / self.cap)
        if self.interpret:
            return 1 / (1 + jnp.exp2(jnp.minimum(x, 60.0)))
        if x.ndim == 1:
            # A thread may have one row alone, which has no other to pair with.
            one = 1 + self.exp2(x)
            return _instructions("rcp.approx.ftz.f32 $0, $1;", one)
        return _instructions(_HALVES, x, pack=2)

    def z(self, scores, shift):
        """Logits in base 2 less `shift`, and `tanh_half` or None.

        The subtraction and a multiplication are one instruction.
        """
        if self.cap is None:
            return scores * (self.scale * LOG2E) - shift, None
        half = self.tanh_half(scores)
        cap = self.cap * LOG2E
        return (cap - shift) - (2 * cap) * half, half

    def clipped(self, p):
        """Probabilities after the clip; those without one as they are."""
        if self.clip is None:
            return p
        gamma, zeta = self.clip
        return jnp.clip((zeta - gamma) * p + gamma, 0.0, 1.0)

    def unclipped(self, p, dc):
        """Gradient of probabilities, from that of the clipped ones."""
        if self.clip is None:
            return dc
        gamma, zeta = self.clip
        a = (zeta - gamma) * p + gamma
        inside = a > 0.0
        if zeta > 1.0:
            # Otherwise none is above: where p is 1, two kernels that round it
            # to either side would not have the same gradient.
            inside = jnp.logical_and(inside, a < 1.0)
        return jnp.where(inside, (zeta - gamma) * dc, 0.0)

    def scores_gradient(self, p, dp, delta, half):
        """Gradient of scores, but for the factor `gradient_scale`."""
        dz = p * (dp - delta)
        # 1 - tanh^2 is 4 h (1 - h).
        return dz if half is None else dz * (half - half * half)

    @property
    def gradient_scale(self):
        """What gradients by queries and keys are multiplied by, last."""
        return self.scale if self.cap is None else 4 * self.scale

    def visible(self, t, s, ids_t, ids_s):
        """Which keys s queries t see; positions that broadcast."""
        mask = s <= t
        if self.window is not None:
            mask = jnp.logical_and(mask, t - s < self.window)
        if ids_t is not None:
            mask = jnp.logical_and(mask, ids_t == ids_s)
        return mask


# Of two numbers at once: a = 1 + 2^x, b = 1 + 2^y, and 1 / (a b) gives b's and
# a's reciprocal. Exponentials and reciprocals are what a capped kernel waits
# for: these are three of them and not four. 60 is where a b cannot overflow.
_HALVES = """{
.reg .f32 a, b, r;
min.NaN.f32 a, $2, 0f42700000;
min.NaN.f32 b, $3, 0f42700000;
ex2.approx.ftz.f32 a, a;
ex2.approx.ftz.f32 b, b;
add.f32 a, a, 0f3F800000;
add.f32 b, b, 0f3F800000;
mul.f32 r, a, b;
rcp.approx.ftz.f32 r, r;
mul.f32 $0, r, b;
mul.f32 $1, r, a;
}"""


def _instructions(asm, x, pack=1):
    [y] = plgpu.elementwise_inline_asm(
        asm,
        args=[x],
        constraints=",".join(["=f"] * pack + ["f"] * pack),
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return y


def product(a, b):
    """Matrix product, summed in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def positions(block, size):
    """Those of a block, int32 (size,)."""
    return block * size + jnp.arange(size, dtype="int32")


def _rows(ref, start, size, length, at):
    """A block of a ref, and the mask of its rows or None."""
    rows = pl.ds(start, size)
    block = ref.at[tuple(rows if part is ... else part for part in at)]
    if length is None:
        return block, None
    mask = start + jnp.arange(size, dtype="int32") < length
    if len(block.shape) == 2:
        mask = jnp.broadcast_to(mask[:, None], block.shape)
    return block, mask


def load(ref, start, size, length, at=(...,)):
    """Rows of a block from `start`: zeros beyond `length`, unless None.

    Args:
        ref: of time and of other axes.
        length: int, or None where the block is known to lie within the ref.
        at: index of the ref, `...` standing for the rows.
    """
    block, mask = _rows(ref, start, size, length, at)
    if mask is None:
        return plgpu.load(block)
    return plgpu.load(block, mask=mask, other=0)


def store(ref, start, size, length, value):
    """The opposite of `load`: nothing is written beyond `length`."""
    block, mask = _rows(ref, start, size, length, (...,))
    plgpu.store(block, value.astype(ref.dtype), mask=mask)


def _ceil(a, b):
    return lax.div(a + (b - 1), jnp.int32(b))


def key_phases(i, blocks, length, window):
    """Blocks of keys that queries of block i see, in three parts.

    Returns:
        Bounds `(first, full, masked, end)`: of blocks in [full, masked) every
        query sees every key; the others, before and after, need a mask.
    """
    Q, S = blocks.queries, blocks.keys
    start = i * Q
    end = jnp.minimum(_ceil(start + Q, S), -(-length // S))
    masked = lax.div(start + 1, jnp.int32(S))
    if window is None:
        return 0, 0, masked, end
    first = lax.div(jnp.maximum(start - (window - 1), 0), jnp.int32(S))
    full = _ceil(jnp.maximum(start + Q - window, 0), S)
    full = jnp.maximum(first, jnp.minimum(full, masked))
    return first, full, jnp.maximum(full, masked), end


def query_phases(j, blocks, length, window):
    """Blocks of queries that see keys of block j; else as `key_phases`.

    A block that passes the end of the sequence counts as masked.
    """
    Q, S = blocks.queries, blocks.keys
    start = j * S
    first = lax.div(start, jnp.int32(Q))
    end, masked = -(-length // Q), length // Q
    if window is not None:
        last = start + (S - 1) + (window - 1)
        end = jnp.minimum(lax.div(last, jnp.int32(Q)) + 1, end)
        masked = jnp.minimum(lax.div(start + window, jnp.int32(Q)), masked)
    full = jnp.minimum(_ceil(start + (S - 1), Q), end)
    return first, full, jnp.maximum(full, jnp.minimum(masked, end)), end


def visit(bounds, step, carry, everywhere):
    """Calls `step(block, carry, masked)` for every block of the phases.

    Args:
        everywhere: bool. Whether all blocks need a mask.
    """
    first, full, masked, end = bounds

    def loop(start, stop, carry, mask):
        if isinstance(start, int) and isinstance(stop, int) and start >= stop:
            return carry
        start, stop = jnp.int32(start), jnp.int32(stop)
        return lax.fori_loop(start, stop, lambda i, c: step(i, c, mask), carry)

    if everywhere:
        return loop(first, end, carry, True)
    carry = loop(first, full, carry, True)
    carry = loop(full, masked, carry, False)
    return loop(masked, end, carry, True)
