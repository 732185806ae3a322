"""Parts of a model that torch runs as programs, free of Keras.

On a GPU they are compiled; here they are traced, which must change no bit.
"""

import contextlib

import keras
import numpy as np
import pytest

import keras_stable as ks
from keras_stable import losses
from keras_stable import telemetry

if keras.backend.backend() != "torch":
    pytest.skip("other backends compile whole steps", allow_module_level=True)

import torch
from torch._dynamo.backends import common
from torch._functorch.compilers import make_boxed_compiler
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from keras_stable.backend import torch as backend
from keras_stable.backend import torch_programs as programs
from keras_stable.backend import torch_transfers

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 31, (4, 10)).astype("int32")
DOCUMENTS = np.array([[1] * 5 + [2] * 4, [1] * 9] * 2, "int32")


@pytest.fixture(autouse=True)
def programs_of_its_own(monkeypatch):
    for name in ("_programs", "_calls"):
        monkeypatch.setattr(programs, name, {})


def train(variant="baseline", masked=False, watched=False, **kwargs):
    """Weights after three steps, and what the monitor measured."""
    keras.utils.set_random_seed(0)
    backbone = ks.StableBackbone(31, 3, 2, 16, variant=variant, **kwargs)
    lm = ks.StableCausalLM(backbone)
    lm.compile(ks.AdamW(0.01))
    x = {"token_ids": IDS[:, :-1]}
    if masked:
        x["padding_mask"] = DOCUMENTS
    tables = []
    if watched:
        with ks.watch(lm) as watch:
            for _ in range(3):
                lm.train_on_batch(x, IDS[:, 1:])
                tables += [s.tensors for s in watch.read()]
    else:
        for _ in range(3):
            lm.train_on_batch(x, IDS[:, 1:])
    weights = [keras.ops.convert_to_numpy(w) for w in lm.weights]
    return weights, tables


def eagerly(monkeypatch, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(
            telemetry.backend, "region", lambda owner, f, key, training: f
        )
        return train(**kwargs)


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ks.VARIANTS)
def test_blocks_share_programs_and_change_no_bit(name, monkeypatch):
    weights, _ = train(name)
    # Gemma 2's layers are of two kinds: with a window, and without.
    kinds = {ks.VARIANTS[name].at(3, layer=i) for i in range(3)}
    assert len(programs._programs) == len(kinds)
    same(weights, eagerly(monkeypatch, variant=name)[0])


@pytest.mark.parametrize("name", ks.VARIANTS)
def test_programs_copy_nothing_from_the_host(name):
    train(name)
    for program in programs._programs.values():
        targets = {str(node.target) for node in program.graph.nodes}
        # What a trace makes of `as_tensor`; on a GPU every run would wait.
        assert not any("lift_fresh" in target for target in targets)


@pytest.mark.parametrize(
    "kwargs, count",
    [({"masked": True}, 1), ({"remat": "block"}, 1), ({"remat": "mlp"}, 2)],
)
def test_documents_and_remat(kwargs, count, monkeypatch):
    same(train(**kwargs)[0], eagerly(monkeypatch, **kwargs)[0])
    assert len(programs._programs) == count


@pytest.mark.parametrize("remat", ["none", "mlp", "block"])
@pytest.mark.parametrize("name", ["baseline", "qk_norm_cap", "sigma_reparam"])
def test_what_is_measured_leaves_a_program(name, remat, monkeypatch):
    how = {"variant": name, "watched": True, "remat": remat}
    weights, tables = train(**how)
    # One program, or one for each half, from the first step on.
    assert len(programs._programs) == (2 if remat == "mlp" else 1)
    expected = eagerly(monkeypatch, **how)
    same(weights, expected[0])
    same(tables, expected[1])
    assert len(tables) == 3
    same(weights, train(variant=name, remat=remat)[0])


def kept(full, variant, monkeypatch):
    """Of a compiled block, bytes kept for the gradient, and its operations.

    Args:
        full: what `Watch.full` is; None: nothing is measured.

    Returns:
        The bytes that its program keeps, the number of operations of its
        gradient, and the bytes that each of two steps kept.
    """
    sizes, steps = [], []

    def forward(graph, inputs):
        *_, output = graph.graph.nodes
        found = [x for x in output.args[0] if x.op == "call_function"]
        sizes.append(sum(x.meta["val"].nbytes for x in found))
        return graph

    def backward(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph

    def pack(x):
        # With the memory, so that no other has its place.
        storage = x.untyped_storage()
        steps[-1][storage.data_ptr()] = storage
        return x

    compiler = common.aot_autograd(
        fw_compiler=make_boxed_compiler(forward),
        bw_compiler=make_boxed_compiler(backward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    move = programs._measured_last

    def compiled(program):
        return torch.compile(move(program), backend=compiler, dynamic=False)

    dtype = "mixed_bfloat16"
    sizes_of = {"num_layers": 1, "num_heads": 2, "hidden_dim": 128}
    backbone = ks.StableBackbone(31, **sizes_of, variant=variant, dtype=dtype)
    lm = ks.StableCausalLM(backbone)
    lm.compile(ks.AdamW(0.01))
    x = {"token_ids": RNG.integers(0, 31, (8, 256))}
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(programs, "_programs", {})
        patch.setattr(programs, "_measured_last", compiled)
        if full is not None:
            stack.enter_context(ks.watch(lm)).full = full
        for _ in range(2):
            steps.append({})
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                lm.train_on_batch(x, x["token_ids"])
    return *sizes, [sum(y.nbytes() for y in step.values()) for step in steps]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own.
@pytest.mark.parametrize("variant", ["baseline", "qk_norm_cap"])
def test_what_is_measured_lets_no_activation_be_kept(variant, monkeypatch):
    size, operations, plain = kept(None, variant, monkeypatch)
    activation = 8 * 256 * 128 * 2
    for full in (False, True):
        measured, after, steps = kept(full, variant, monkeypatch)
        # Rows of statistics, or some tokens, but no activation (8, 256, 128).
        assert measured - size < activation
        assert after == operations
        # Not in the first step either, which decides the peak of a run.
        for step, bytes_of_plain in zip(steps, plain, strict=True):
            assert step - bytes_of_plain < activation


def test_what_is_written_in_place_keeps_its_order():
    def function(x):
        y = x.clone()
        y[0] = 3.0
        return y * 2.0, x.detach().sum()

    x = torch.arange(4.0)
    program = programs._measured_last(programs.trace(function, x))
    same(program(x), function(x))


@pytest.mark.parametrize("name", ks.VARIANTS)
def test_no_block_writes_in_place(name):
    train(name, watched=True)
    for program in programs._programs.values():
        for node in program.graph.nodes:
            schema = getattr(node.target, "_schema", None)
            assert schema is None or not schema.is_mutable


def test_dropout_runs_as_it_is():
    train(dropout=0.1)
    assert not programs._programs


def test_other_shapes_get_programs_outside_of_training_when_common():
    backbone = ks.StableBackbone(31, 2, 2, 16)
    for _ in range(programs.PATIENCE // 2 - 1):
        backbone({"token_ids": IDS})
    assert not programs._programs
    before = backbone({"token_ids": IDS})
    after = backbone({"token_ids": IDS})
    assert len(programs._programs) == 1
    assert torch.equal(before, after)


def test_structures_do_not_share_programs():
    train("baseline")
    train("qk_norm")
    train("baseline", num_key_value_heads=1)
    assert len(programs._programs) == 3


def test_numbers_are_those_of_torch():
    with backend.queueing():
        for data in (True, 3, 2.5, [1, 2], np.array([1.5])):
            found = torch.as_tensor(data)
            assert found.dtype == torch.tensor(data).dtype
            assert found.tolist() == torch.tensor(data).tolist()
    assert torch.as_tensor.__module__ != backend.__name__


def test_updates_are_counted_whatever_assigns(monkeypatch):
    lm = ks.StableCausalLM(ks.StableBackbone(31, 1, 2, 8))
    lm.compile(ks.AdamW(0.01))
    counts, count = [], backend._updates_made

    def counted(optimizer):
        counts.append(count(optimizer))
        return counts[-1]

    monkeypatch.setattr(backend, "_updates_made", counted)

    def step():
        lm.train_on_batch({"token_ids": IDS[:, :-1]}, IDS[:, 1:])

    step(), step()
    lm.optimizer.iterations.assign(70)
    step(), step()
    lm.optimizer.iterations.assign(0)
    step()
    lm.optimizer.load_own_variables(
        {str(i): v.numpy() for i, v in enumerate(lm.optimizer.variables)}
    )
    step()
    assert counts == [0, 1, 70, 71, 0, 1]


@pytest.mark.parametrize(
    "output_cap, z_weight, dtype",
    [(None, 0.0, "float32"), (30.0, 1e-4, "float32"), (None, 1e-4, None)],
)
def test_fused_functions_are_traced_without_numbers(
    output_cap, z_weight, dtype
):
    rng = np.random.default_rng(0)
    raw = torch.tensor(rng.normal(size=(6, 11)), dtype=torch.float32)
    target = torch.tensor([0, 3, 10, 5, 5, 11], dtype=torch.int32)
    weight = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 0.0])

    def rows(raw, target, weight):
        return losses._rows(raw, target, weight, output_cap, z_weight, dtype)

    program = programs.trace(rows, raw, target, weight, mode="fake")
    # Others than those it was traced with.
    args = raw + 1.0, target.flip(0), weight.flip(0)
    for found, expected in zip(program(*args), rows(*args), strict=True):
        if expected is None:
            assert found is None
        else:
            torch.testing.assert_close(
                found, expected, rtol=0, atol=0, equal_nan=True
            )


def test_a_loss_has_one_backward_pass():
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    kernel, target = torch.randn(4, 8), torch.zeros(1, 3, dtype=torch.int32)
    loss = ks.next_token_loss(hidden, kernel, target, training=True)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Compute the loss again"):
        loss.backward()


def test_numbers_that_arrive_later_are_numbers():
    handle = torch_transfers.start_read(torch.tensor([0.5, 2.5]))
    first, second = (torch_transfers._Arriving(handle, i) for i in range(2))
    assert float(first) == 0.5
    assert np.array(second) == np.float32(2.5)


def test_copies_are_joined_and_come_apart(monkeypatch):
    monkeypatch.setattr(torch_transfers, "STAGE", 64)
    kinds = [("float32", ()), ("float32", (3, 5)), ("bfloat16", (7, 9))]
    kinds += [("int32", (2,)), ("float32", (0, 4)), ("int64", ())]
    kinds += [("bool", (3,)), ("float32", (30,)), ("bfloat16", (1,))]
    variables = []
    for dtype, shape in kinds:
        value = RNG.normal(size=shape) * 9
        variable = keras.Variable(value, dtype=dtype, trainable=False)
        variables.append(variable)
    expected = [keras.ops.convert_to_numpy(v).copy() for v in variables]
    handle = torch_transfers.start_copies(variables)
    assert len(handle[0]) < len(variables)
    for variable in variables:
        variable.assign(keras.ops.zeros_like(variable))
    found = torch_transfers.finish_copies(handle)
    for copy, value in zip(found, expected, strict=True):
        assert (copy.dtype, copy.shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(copy, value)


@pytest.mark.parametrize("size", [0, 1, 16, 40])
def test_a_piece_goes_through_the_stage(size):
    class Stream:
        def synchronize(self):
            pass

    stage, piece = torch.empty(64, dtype=torch.uint8), torch.randn(size)
    host = torch_transfers._through(stage, piece, Stream())
    np.testing.assert_array_equal(host, piece.numpy())
