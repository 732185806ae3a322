"""What is read from programs, against what was written into them."""

import itertools

import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable import costs
from keras_stable import hlo

JAX = keras.backend.backend() == "jax"
with_jax = pytest.mark.skipif(not JAX, reason="compiles with jax")


def compiled(function, *shapes):
    import jax

    given = [jax.ShapeDtypeStruct(s, "float32") for s in shapes]
    text = jax.jit(function).lower(*given).compile().as_text()
    return costs.summarize(text)


@with_jax
def test_products_count_as_often_as_they_run():
    import jax
    from jax import numpy as jnp

    def function(x, w):
        def step(c, part):
            return jnp.tanh(c @ part), None

        y = jax.lax.scan(step, x, w)[0]
        return jax.lax.fori_loop(0, 3, lambda i, y: jnp.sin(y @ y), y)

    found = compiled(function, (32, 32), (5, 32, 32))
    assert found["flops"] == (5 + 3) * 2 * 32**3
    assert found["unknown_loops"] == 0
    # Each pass reads a matrix at least.
    assert found["memory_traffic"] > 8 * 4 * 32 * 32


@with_jax
def test_a_loop_of_unknown_length_is_told():
    import jax

    def function(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100.0, lambda x: x @ x, x)

    found = compiled(function, (8, 8))
    assert found["unknown_loops"] == 1 and found["flops"] == 2 * 8**3


@pytest.mark.parametrize("step, passes", [(1, 7), (2, 4), (7, 1)])
def test_unrolled_loops_pass_less_often(step, passes):
    state = "(s32[], f32[4,4]{1,0})"
    text = f"""
%body (p: {state}) -> {state} {{
  %p = {state} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,4]{{1,0}} get-tuple-element(%p), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %y = f32[4,4]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}
  ROOT %t = {state} tuple(%next, %y)
}}

%condition (p: {state}) -> pred[] {{
  %p = {state} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(7)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main (a: {state}) -> {state} {{
  %a = {state} parameter(0)
  ROOT %w = {state} while(%a), condition=%condition, body=%body
}}
"""
    found = costs.summarize(text)
    assert found["flops"] == passes * 2 * 4**3
    assert found["unknown_loops"] == 0


@pytest.mark.parametrize("case", range(6))
def test_convolutions_are_counted_without_their_padding(case):
    rng = np.random.default_rng(case)
    k, stride, low, high, base, step = rng.integers(1, 4, 6)
    length = int(rng.integers(4, 9))
    dilated = (length - 1) * base + 1
    out = (dilated + low + high - (k - 1) * step - 1) // stride + 1
    if out < 1:
        out = 0
    pairs = 0
    for i, j in itertools.product(range(out), range(k)):
        at = i * stride + j * step - low
        pairs += 0 <= at < dilated and at % base == 0
    window = f"size={k} stride={stride} pad={low}_{high} lhs_dilate={base} "
    window += f"rhs_dilate={step}"
    text = "\n".join(
        [
            f"ENTRY %main (x: f32[2,3,{length}]) -> f32[2,5,{out}] {{",
            f"  %x = f32[2,3,{length}]{{2,1,0}} parameter(0)",
            f"  %w = f32[5,3,{k}]{{2,1,0}} parameter(1)",
            f"  ROOT %c = f32[2,5,{out}]{{2,1,0}} convolution(%x, %w), "
            f"window={{{window}}}, dim_labels=bf0_oi0->bf0",
            "}",
        ]
    )
    assert costs.summarize(text)["flops"] == 2 * pairs * 2 * 3 * 5


@with_jax
def test_collectives_are_found_with_their_bytes():
    import jax
    from jax.sharding import PartitionSpec

    mesh = jax.make_mesh((2, 2), ("a", "b"))

    def local(x):
        def step(c, _):
            return jax.lax.psum(c, "b") * 0.5, None

        x = jax.lax.scan(step, x, None, length=7)[0]
        x = jax.lax.all_gather(x, "a", tiled=True)
        x = jax.lax.psum_scatter(x, ("a", "b"), tiled=True)
        x = jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])
        return jax.lax.all_to_all(x, "b", 0, 0, tiled=True)

    spec = PartitionSpec(("a", "b"))
    function = jax.shard_map(
        local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    x = jax.ShapeDtypeStruct(
        (64, 16), "float32", sharding=jax.sharding.NamedSharding(mesh, spec)
    )
    text = jax.jit(function).lower(x).compile().as_text()
    found = {
        one["kind"]: (one["devices"], one["count"], one["bytes"])
        for one in costs.summarize(text)["collectives"]
    }
    part = 64 * 16 * 4 // 4  # Of each device.
    assert found["all-reduce"] == ([0, 1], 7, 7 * part)
    assert found["all-gather"] == ([0, 2], 1, 2 * part)
    everyone = found["reduce-scatter"]
    assert everyone[1:] == (1, 2 * part) and len(everyone[0]) in (0, 4)
    assert found["collective-permute"] == ([0, 2], 1, part // 2)
    assert found["all-to-all"][:2] == ([0, 1], 1)


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (8, 1), (2, 2, 2)])
def test_groups_are_read_however_they_are_written(shape):
    """Those of each axis of a mesh, and of two, as lists and as formulas."""
    places = np.arange(np.prod(shape)).reshape(shape)
    names = "xyz"[: len(shape)]
    for n in (1, 2):
        for axes in itertools.combinations(range(len(shape)), n):
            others = [a for a in range(len(shape)) if a not in axes]
            order = (*others, *axes)
            groups = places.transpose(order).reshape(
                -1, np.prod([shape[a] for a in axes])
            )
            expected = list(groups[0])
            listed = ",".join("{" + ",".join(map(str, g)) + "}" for g in groups)
            text = f"replica_groups={{{listed}}}, x=1"
            assert costs.group(text) == expected
            dims = ",".join(map(str, shape))
            turned = ",".join(map(str, order))
            sizes = ",".join(map(str, groups.shape))
            text = f"replica_groups=[{sizes}]<=[{dims}]T({turned}), x=1"
            assert costs.group(text) == expected
            mesh = ",".join(f"'{k}'={s}" for k, s in zip(names, shape))
            wanted = ",".join(f"'{names[a]}'" for a in axes)
            text = f"replica_groups=mesh[{mesh}] {{{wanted}}}, x=1"
            assert costs.group(text) == expected


def test_fast_memory_is_not_the_main_one():
    shape = "(bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, f32[3]{0:T(128)}, s8[])"
    assert hlo.size(shape) == 4 * 8 * 2 + 3 * 4 + 1
    assert hlo.size(shape, main_memory=True) == 3 * 4 + 1


def test_kernels_count_the_blocks_they_visit():
    def kernel(name, rows, width):
        q = "bf16[2,3,1024,64]{3,2,1,0}"
        layouts = f"{{s8[1,{rows},{width}]{{2,1,0}}, {q}}}"
        return "\n".join(
            [
                f"ENTRY %main (q: {q}) -> {q} {{",
                f"  %q = {q} parameter(0)",
                f"  ROOT %{name}.1 = {q} custom-call(%q), "
                f"operand_layout_constraints={layouts}, "
                "frontend_attributes={kernel_metadata={",
                "}}",
                "}",
            ]
        )

    block = 2 * 2 * 3 * 64 * 256**2
    for name, products in ("fwd", 2), ("dq", 3), ("dkv", 4):
        text = kernel(f"splash_mha_{name}_residuals", 4, 4)
        assert costs.summarize(text)["flops"] == products * 10 * block
    text = kernel("splash_mha_fwd_residuals", 4, 2)
    assert costs.summarize(text)["flops"] == 2 * 7 * block


@pytest.mark.skipif(JAX, reason="there are plans")
def test_other_backends_refuse_plans():
    with pytest.raises(ValueError, match="KERAS_BACKEND=jax"):
        ks.plan(lambda: None, 8, 16, "cpu:4")
