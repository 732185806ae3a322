"""Causal attention on GPUs, by kernels in Triton: see `torch_attention`.

```
z = scale * q k^T, then cap * tanh(z / cap) if there is a cap    float32
p = softmax(z over visible keys)                                 float32
c = clip((zeta - gamma) p + gamma, 0, 1) if it is clipped, else p
y = c v
```

What kernels share, and that of outputs; `triton_gradients` has the others.
No program adds to what another one adds to: the same inputs give the same
bits. Logits are in base 2, `z log2(e)`, for GPUs have exp2.

B batch, T query time, S key time, N query heads, K key and value heads,
G = N / K queries a key, H head dimension. Arrays are contiguous: (B, T, N, H);
of numbers of rows (B, N, T).

Source: FlashAttention-2 (arXiv 2307.08691).
"""

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Neither the interpreter nor AMD's compiler knows PTX.
PTX = tl.constexpr(not (INTERPRETED.value or torch.version.hip))
# Below every logit, and finite: less itself it is 0.
LOWEST = tl.constexpr(-1e30)
# Numbers of a block from which each thread has a multiple of four of them.
FOURS = tl.constexpr(2048)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _reciprocal(x):
    """1 / x of numbers from 1 to 2^31, within four units in the last place.

    Reciprocals and powers come from a unit with an eighth of the throughput of
    products, and it bounds the time of a cap. Four numbers share a reciprocal:
    1 / a = (b c d) / (a b c d). NaN in one is NaN in all four.
    """
    if PTX and x.numel >= FOURS:
        y = tl.inline_asm_elementwise(
            """
            {
            .reg .f32 ab, cd, ab_inverse, cd_inverse, inverse;
            mul.f32 ab, $4, $5;
            mul.f32 cd, $6, $7;
            mul.f32 inverse, ab, cd;
            rcp.approx.ftz.f32 inverse, inverse;
            mul.f32 ab_inverse, inverse, cd;
            mul.f32 cd_inverse, inverse, ab;
            mul.f32 $0, ab_inverse, $5;
            mul.f32 $1, ab_inverse, $4;
            mul.f32 $2, cd_inverse, $7;
            mul.f32 $3, cd_inverse, $6;
            }
            """,
            "=&f,=&f,=&f,=&f,f,f,f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        y = 1.0 / x
    return y


@triton.jit
def logits(qk, height, rate, less):
    """`z - less` in base 2, and r, of which its derivative is made.

    Without cap `rate` is None and z is `height * qk`. With one

        z = height * tanh(x),  tanh(x) = 1 - 2 r,  r = 1 / (1 + exp(2 x))

    where 2 x log2(e) is `rate * qk`, and dz / dx = 4 height r (1 - r). From
    2^30 on, exp changes nothing. The error of z is a few 1e-7 of the cap, from
    the difference near x = 0. `tanh.approx.f32` would replace exp and r, with
    an error of 5e-4 of z: 0.02 nats near a cap of 50.
    """
    if rate is None:
        r = qk
        z = qk * height - less
    else:
        x = tl.minimum(qk * rate, 30.0, propagate_nan=tl.PropagateNan.ALL)
        r = _reciprocal(1.0 + tl.exp2(x))
        z = (height - less) - (2.0 * height) * r
    return z, r


@triton.jit
def clipped(p, gamma, width):
    """Clipped probabilities, and which are within the bounds."""
    c = width * p + gamma
    # None is above if zeta <= 1: where p is 1, two kernels that round it to
    # either side would not have the same gradient.
    bound = tl.where(width + gamma > 1.00001, 1.0, float("inf"))
    inner = (c > 0.0) & (c < bound)
    # Alone, both would turn NaN into a bound.
    c = tl.maximum(c, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(c, 1.0, propagate_nan=tl.PropagateNan.ALL), inner


@triton.jit
def visible(
    t, s, ids_t, ids_s, window, EDGE: tl.constexpr, KEYS_FIRST: tl.constexpr
):
    """Which keys queries see, of positions and documents: (T, S) or (S, T).

    Without `EDGE`, all are known to lie in the past and in the window.
    """
    t = t[None, :] if KEYS_FIRST else t[:, None]
    s = s[:, None] if KEYS_FIRST else s[None, :]
    seen = s <= t
    if EDGE and window is not None:
        seen = seen & (t - s < window)
    if ids_t is not None:
        same = (
            ids_t[None, :] == ids_s[:, None]
            if KEYS_FIRST
            else ids_t[:, None] == ids_s[None, :]
        )
        seen = seen & same if EDGE else same
    return seen


@triton.jit
def product(a, b, total=None):
    """`a b + total`, sums in float32."""
    if INTERPRETED:
        # It would multiply the bits of bfloat16.
        a, b = a.to(tl.float32), b.to(tl.float32)
    # Not in TF32, of 10 bits, where the numbers are float32.
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def rows(pointer, i, end, stride, H: tl.constexpr, EDGE: tl.constexpr):
    """Rows `i` of a matrix with H columns; zeros from row `end` on."""
    pointers = pointer + i[:, None] * stride + tl.arange(0, H)[None, :]
    if EDGE:
        x = tl.load(pointers, mask=i[:, None] < end, other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def store_rows(pointer, x, i, end, stride, H: tl.constexpr):
    pointers = pointer + i[:, None] * stride + tl.arange(0, H)[None, :]
    tl.store(pointers, x.to(pointer.dtype.element_ty), mask=i[:, None] < end)


@triton.jit
def ids(pointer, i, end):
    """Documents of positions `i`, or None."""
    if pointer is None:
        found = None
    else:
        found = tl.load(pointer + i, mask=i < end, other=-1)
    return found


@triton.jit
def key_blocks(t0, T, window, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Blocks of keys that some query of a block sees, in three parts.

    Part i is from block i of the tuple to the next; every query sees every
    key of the middle part.
    """
    first, inside = 0, 0
    edge = (t0 + 1) // BLOCK_S
    end = tl.cdiv(tl.minimum(T, t0 + BLOCK_T), BLOCK_S)
    if window is not None:
        first = tl.maximum(0, t0 - window + 1) // BLOCK_S
        inside = tl.cdiv(tl.maximum(0, t0 + BLOCK_T - window), BLOCK_S)
        inside = tl.minimum(inside, end)
        edge = tl.maximum(inside, edge)
    return first, inside, edge, end


@triton.jit
def query_blocks(s0, T, window, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Blocks of queries that see some key of a block, as `key_blocks`."""
    first = s0 // BLOCK_T
    inside = tl.cdiv(s0 + BLOCK_S - 1, BLOCK_T)
    edge = T // BLOCK_T
    end = tl.cdiv(T, BLOCK_T)
    if window is not None:
        edge = tl.minimum(edge, (s0 + window) // BLOCK_T)
        end = tl.cdiv(tl.minimum(T, s0 + BLOCK_S - 1 + window), BLOCK_T)
    inside = tl.minimum(inside, end)
    return first, inside, tl.maximum(inside, edge), end


@triton.jit
def forward_kernel(
    Q,
    K,
    V,
    IDS,
    Y,
    LSE,
    LARGEST,
    ENTROPY,
    T,
    window,
    scale,
    height,
    rate,
    gamma,
    width,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Outputs, normalisers and statistics of a block of queries of one head.

    One pass over the keys, relative to the largest logit m so far; a second
    one where probabilities are clipped, which needs the normaliser. Entropy
    is of one more sum, `weighted` = sum_s exp(z - m) (z - m), which changes by
    (m_before - m) `total` when m does.
    """
    # Programs with many keys start first.
    blocks = tl.cdiv(T, BLOCK_T)
    t0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_T
    head = tl.program_id(0) // blocks
    n = head % N
    start = (head // N).to(tl.int64) * T
    Q += (start * N + n) * H
    Y += (start * N + n) * H
    K += (start * (N // G) + n // G) * H
    V += (start * (N // G) + n // G) * H
    if IDS is not None:
        IDS += start
    MASKED: tl.constexpr = IDS is not None

    t = t0 + tl.arange(0, BLOCK_T)
    q = rows(Q, t, T, N * H, H, True)
    ids_t = ids(IDS, t, T)
    largest = tl.full([BLOCK_T], LOWEST, tl.float32)
    less = logits(largest, height, rate, 0.0)[0]
    total = tl.zeros([BLOCK_T], tl.float32)
    weighted = tl.zeros([BLOCK_T], tl.float32)
    y = tl.zeros([BLOCK_T, H], tl.float32)
    bounds = key_blocks(t0, T, window, BLOCK_T, BLOCK_S)

    for part in tl.static_range(3):
        for block in range(bounds[part], bounds[part + 1]):
            s = block * BLOCK_S + tl.arange(0, BLOCK_S)
            k = rows(K, s, T, N // G * H, H, part != 1)
            qk = product(q, tl.trans(k))
            seen = visible(
                t, s, ids_t, ids(IDS, s, T), window, part != 1, False
            )
            if MASKED or part != 1:
                of_seen = tl.where(seen, qk, -float("inf"))
                largest = tl.maximum(largest, tl.max(of_seen, 1))
            else:
                largest = tl.maximum(largest, tl.max(qk, 1))
            # The cap of the largest logit is the largest capped logit.
            now = logits(largest, height, rate, 0.0)[0]
            z = logits(qk, height, rate, now[:, None])[0]
            if MASKED or part != 1:
                z = tl.where(seen, z, LOWEST)
            p = tl.exp2(z)
            before = tl.exp2(less - now)
            if ENTROPY is not None:
                moved = weighted + (less - now) * total
                weighted = before * moved + tl.sum(p * z, 1)
            total = before * total + tl.sum(p, 1)
            less = now
            if gamma is None:
                v = rows(V, s, T, N // G * H, H, part != 1)
                y = y * before[:, None]
                y = product(p.to(v.dtype), v, y)

    # Rows beyond the end, which are not stored, may have seen nothing.
    total = tl.where(total == 0.0, 1.0, total)
    lse = less + tl.log2(total)
    row = head.to(tl.int64) * T + t
    tl.store(LSE + row, lse, mask=t < T)
    if ENTROPY is not None:
        entropy = LN2 * (tl.log2(total) - weighted / total)
        tl.store(ENTROPY + row, entropy, mask=t < T)
        # Of two numbers the maximum is the one that is not NaN.
        largest = tl.where(lse == lse, scale * largest, lse)
        tl.store(LARGEST + row, largest, mask=t < T)

    if gamma is None:
        y = y / total[:, None]
    else:
        for part in tl.static_range(3):
            for block in range(bounds[part], bounds[part + 1]):
                s = block * BLOCK_S + tl.arange(0, BLOCK_S)
                k = rows(K, s, T, N // G * H, H, part != 1)
                v = rows(V, s, T, N // G * H, H, part != 1)
                qk = product(q, tl.trans(k))
                z = logits(qk, height, rate, lse[:, None])[0]
                if MASKED or part != 1:
                    seen = visible(
                        t, s, ids_t, ids(IDS, s, T), window, part != 1, False
                    )
                    z = tl.where(seen, z, LOWEST)
                p = tl.exp2(z)
                c = clipped(p, gamma, width)[0]
                y = product(c.to(v.dtype), v, y)
    store_rows(Y, y, t, T, N * H, H)
