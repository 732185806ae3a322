"""Backups: what is put back trains on as it did, bit by bit, within `fit`."""

import importlib.util
import types
from pathlib import Path

import keras
import numpy as np
import pytest
from fresh import run
from keras import ops

import keras_stable as ks
from keras_stable import backend
from keras_stable.backend import saving
from keras_stable.backups import Backups
from keras_stable.feed import Feed
from keras_stable.watch import watch

BACKEND = keras.backend.backend()
TOKENS = np.random.default_rng(0).integers(0, 32, 2000)


class Batches(keras.utils.PyDataset):
    """A list of batches, as `fit` takes it."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        return self.batches[number]


def pairs(count, seed=0, rows=4):
    rng = np.random.default_rng(seed)
    return [
        (
            rng.normal(size=(rows, 5)).astype("float32"),
            rng.normal(size=(rows, 3)).astype("float32"),
        )
        for _ in range(count)
    ]


def tiny(optimizer=None, metrics=("mae",), **compile):
    inputs = keras.Input((5,))
    x = keras.layers.Dense(8, activation="tanh")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.3)(x)
    x = keras.layers.Dropout(0.2)(x)
    model = keras.Model(inputs, keras.layers.Dense(3, dtype="float32")(x))
    optimizer = optimizer or ks.AdamW(1e-2)
    model.compile(optimizer, "mse", metrics=list(metrics), **compile)
    return model


def language_model(variant="sigma_reparam"):
    backbone = ks.StableBackbone(32, 1, 2, 16, variant=variant, dropout=0.1)
    lm = ks.StableCausalLM(backbone)
    lm.compile(ks.AdamW(ks.WarmupSchedule(1e-2, 4)))
    return lm


def values(model):
    """All that a model is, as arrays of their own."""
    variables = saving.variables_of(model, metrics=True)
    variables = [*variables.values(), saving.default_seed()]
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


class At(keras.callbacks.Callback):
    """Calls functions at the beginning of steps, counted from 0."""

    def __init__(self, **actions):
        super().__init__()
        self.actions, self.step = actions, 0

    def on_train_batch_begin(self, batch, logs=None):
        action = self.actions.get(f"at_{self.step}")
        self.step += 1
        if action is not None:
            action()


def and_back(model, data, taken=3, back=6):
    """`fit` that takes a copy at a step, and goes back to it at a later one.

    Returns what it was then, and when it was there anew.
    """
    backups, feed = Backups(model), Feed(data)
    first, second = [], []

    def go_back():
        first.extend(values(model))
        backup = backups.newest(certified=False)
        assert backup.place == taken
        backups.restore(backup)
        feed.seek(backup.place)

    actions = {
        f"at_{taken}": lambda: backups.take(taken, feed.position),
        f"at_{back}": go_back,
        f"at_{2 * back - taken}": lambda: second.extend(values(model)),
    }
    with watch(model) as observed:
        observed.full = False
        observed.feed = lambda: feed.next()[1]
        model.fit(data, callbacks=[At(**actions)], verbose=0)
    return first, second


MODELS = {
    "adamw": lambda: tiny(),
    "adam": lambda: tiny(keras.optimizers.Adam(1e-2, clipnorm=1.0)),
    "momentum": lambda: tiny(keras.optimizers.SGD(1e-2, momentum=0.9)),
    "accumulation": lambda: tiny(ks.AdamW(1e-2, gradient_accumulation_steps=4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_on_as_it_did(name):
    model = MODELS[name]()
    first, second = and_back(model, Batches(pairs(10)))
    same(second, first)


@pytest.mark.parametrize("taken", [1, 2])
@pytest.mark.parametrize("back", [4, 5])
def test_in_the_midst_of_accumulated_batches(taken, back):
    model = MODELS["accumulation"]()
    first, second = and_back(model, Batches(pairs(10)), taken, back)
    same(second, first)


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    model = tiny(keras.optimizers.Adam(1e-2))
    assert hasattr(model.optimizer, "inner_optimizer")
    first, second = and_back(model, Batches(pairs(10)))
    same(second, first)


def test_spectral_vectors_and_dropout_of_a_language_model():
    data = ks.TokenBatches(TOKENS, 4, 8, vocabulary_size=32)
    first, second = and_back(language_model(), data.repeat()[:10])
    same(second, first)


def test_bfloat16_weights():
    keras.config.set_dtype_policy("bfloat16")
    model = tiny(keras.optimizers.SGD(1e-2, momentum=0.9))
    assert model.trainable_variables[0].dtype == "bfloat16"
    first, second = and_back(model, Batches(pairs(10)))
    same(second, first)


def test_four_devices():
    if BACKEND != "jax":
        pytest.skip("jax has meshes")
    import jax

    ks.set_distribution("fsdp+tensor", 4, 2, jax.devices()[:4])
    data = ks.TokenBatches(TOKENS, 4, 8, vocabulary_size=32)
    lm = language_model()
    before = [v.value.sharding for v in lm.weights]
    first, second = and_back(lm, data.repeat()[:10])
    same(second, first)
    assert [v.value.sharding for v in lm.weights] == before
    assert {len(sharding.device_set) for sharding in before} == {4}
    assert not all(sharding.is_fully_replicated for sharding in before)


def test_seeds_go_back():
    import random

    backups = Backups(tiny())
    backups.take(0, 0, certified=True)

    def draw():
        drawn = keras.random.normal((2,))
        drawn = keras.ops.convert_to_numpy(drawn)
        return [random.random(), np.random.rand(), *drawn]

    expected = draw()
    assert draw() != expected
    backups.restore(backups.newest())
    assert draw() == expected


def test_twice_from_one_copy():
    model, batches = tiny(), Batches(pairs(3))
    model.fit(batches, verbose=0)
    backups = Backups(model)
    backups.take(3, 3, certified=True)
    expected = values(model)
    for _ in range(2):
        # Buffers are donated: the copy is not among them.
        model.fit(batches, verbose=0)
        backups.restore(backups.newest())
        same(values(model), expected)


def test_at_the_end_of_a_step():
    model = tiny()
    backups, first = Backups(model), []

    def act(batch, logs=None):
        if batch == 2:
            backups.take(3, 3)
            first.extend(values(model))
        if batch == 4:
            backups.restore(backups.newest(certified=False))

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=act)
    model.fit(Batches(pairs(5)), callbacks=[callback], verbose=0)
    same(values(model), first)


def test_metrics_that_were_not_there_are_as_at_the_beginning():
    model = tiny()
    backups = Backups(model)
    backups.take(0, 0, certified=True)
    model.fit(Batches(pairs(3)), verbose=0)
    backups.restore(backups.newest())
    assert all(not np.any(np.array(v)) for v in model.metrics_variables)


# Which are kept.


def steps_of(backups):
    certified = [b.step for b in backups._settled() if b.certified]
    return certified, [b.step for b in backups._settled() if not b.certified]


@pytest.mark.parametrize("files", [False, True])
def test_what_is_kept(tmp_path, files):
    backups = Backups(tiny(), tmp_path if files else None, keep=2)
    backups.take(0, 0, {"a": [1]}, certified=True)
    one = backups.nbytes
    assert one > 0
    backups.take(10, 12)
    backups.take(20, 22)
    assert steps_of(backups) == ([0], [10, 20])
    # The older stays until it is judged.
    backups.take(30, 32)
    assert steps_of(backups) == ([0], [10, 30])
    assert backups.certify(10) and not backups.certify(20)
    assert steps_of(backups) == ([0, 10], [30])
    backups.take(40, 42)
    assert backups.certify(30) == 1 and backups.certify(30) == 0
    assert steps_of(backups) == ([10, 30], [40])
    backups.drop(after=39)
    assert steps_of(backups) == ([10, 30], [])
    assert backups.newest(before=30).step == 10
    assert backups.newest(before=10) is None
    backups.take(50, 52, ["x"])
    assert backups.newest().step == 30
    newest = backups.newest(certified=False)
    assert (newest.step, newest.place, newest.extra) == (50, 52, ["x"])
    assert backups.nbytes == 3 * one
    if files:
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == [
            *["00000010.good.npz", "00000030.good.npz", "00000050.npz"],
        ]
    # The same step anew.
    backups.take(50, 60)
    assert backups.newest(certified=False).place == 60
    assert steps_of(backups) == ([10, 30], [50])
    backups.close()


def test_memory_is_bounded():
    model = tiny()
    backups = Backups(model, keep=2)
    backups.take(0, 0, certified=True)
    one, most = backups.nbytes, 0
    for step in range(1, 30):
        backups.take(step, step)
        most = max(most, backups.nbytes)
        if step % 3 == 0:
            backups.certify(step)
    assert most == 4 * one


def test_extra_is_a_copy_of_jsons_values():
    backups, extra = Backups(tiny()), {"detectors": [1.5, None]}
    backups.take(1, 1, extra)
    extra["detectors"].append(2)
    assert backups.newest(certified=False).extra == {"detectors": [1.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        backups.take(2, 2, {"x": np.zeros(2)})


@pytest.mark.parametrize("kind", ["weight", "slot"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_never_certified(kind, bad, capsys):
    model = tiny()
    model.fit(Batches(pairs(1)), verbose=0)
    backups = Backups(model)
    owner = model if kind == "weight" else model.optimizer
    variable = [v for v in owner.variables if len(v.shape) == 2][-1]
    value = np.array(ops.convert_to_numpy(variable))
    value[0, -1] = bad
    variable.assign(value)
    backups.take(1, 1)
    assert not backups.certify(1)
    assert "not finite" in capsys.readouterr().out
    assert backups.newest(certified=False) is None and not backups.nbytes
    backups.take(2, 2, certified=True)
    assert backups.newest() is None


def test_metrics_need_not_be_finite():
    model = tiny()
    x, y = pairs(1)[0]
    model.fit(x, y, verbose=0)
    model.metrics_variables[0].assign(np.inf)
    backups = Backups(model)
    backups.take(1, 1)
    assert backups.certify(1)


@pytest.mark.parametrize("arguments", [(-1, 0), (0, -1), (1.0, 0), (0, None)])
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match="must be an integer"):
        Backups(tiny()).take(*arguments)
    with pytest.raises(ValueError, match="keep"):
        Backups(tiny(), keep=0)


# Files.


CODE = """
import sys
sys.path.insert(0, sys.argv[1])
import keras
import numpy as np
from test_backups import Backups, Batches, language_model, pairs, tiny, values
keras.utils.set_random_seed(7)
keras.config.set_dtype_policy(sys.argv[3])
model = tiny(keras.optimizers.SGD(1e-2, momentum=0.9))
model.fit(Batches(pairs(2)), verbose=0, shuffle=False)
backups = Backups(model, sys.argv[2])
backups.take(0, 5, certified=True)
model.fit(Batches(pairs(2, seed=1)), verbose=0, shuffle=False)
backups.take(2, 7, {"detectors": [1, 2]})
backups.close()
found = [x.astype("float64") for x in values(model)]
np.savez(sys.argv[2] + "/expected", *found)
"""


@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
def test_files_survive_a_process(tmp_path, policy):
    run(CODE, Path(__file__).parent, tmp_path, policy)
    (tmp_path / "00000009.part").write_bytes(b"begun")
    (tmp_path / "00000008.good.part").write_bytes(b"begun")
    keras.config.set_dtype_policy(policy)
    model = tiny(keras.optimizers.SGD(1e-2, momentum=0.9))
    model.fit(Batches(pairs(2)), verbose=0)
    backups = Backups(model, tmp_path)
    assert not list(tmp_path.glob("*.part"))
    assert backups.newest().place == 5
    newest = backups.newest(certified=False)
    assert (newest.step, newest.place) == (2, 7)
    assert newest.extra == {"detectors": [1, 2]}
    backups.restore(newest)
    with np.load(tmp_path / "expected.npz") as expected:
        same([x.astype("float64") for x in values(model)], expected.values())
    assert backups.certify(2)
    assert (tmp_path / "00000002.good.npz").exists()


@pytest.fixture
def written(tmp_path):
    model = tiny()
    model.fit(Batches(pairs(1)), verbose=0)
    backups = Backups(model, tmp_path)
    backups.take(1, 1, certified=True)
    return model, backups, backups.newest().path


def test_every_damage_is_found_and_nothing_changed(written):
    model, backups, path = written
    whole, backup = path.read_bytes(), backups.newest()
    expected = values(model)
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(60):
        content = bytearray(whole)
        if i < 20:
            content = content[: int(rng.integers(0, len(whole)))]
        else:
            content[int(rng.integers(0, len(whole)))] ^= 1 << (i % 8)
        path.write_bytes(content)
        try:
            backups.restore(backup)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
        # Bits that say nothing, as a file's time within the archive.
        same(values(model), expected)
    assert refused > 40
    path.unlink()
    with pytest.raises(ValueError, match="damaged"):
        backups.restore(backup)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(99)])
def test_foreign_files_are_refused_at_the_beginning(tmp_path, content):
    path = tmp_path / "00000003.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="00000003.npz is no backup.*Delete"):
        Backups(tiny(), tmp_path)


def test_archives_of_others_are_refused(tmp_path):
    np.savez(tmp_path / "00000003.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match="is no backup"):
        Backups(tiny(), tmp_path)
    (tmp_path / "00000003.npz").unlink()
    pickled = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "00000003.npz", meta=pickled)
    with pytest.raises(ValueError, match="allow_pickle"):
        Backups(tiny(), tmp_path)


def test_other_names_are_left_alone(tmp_path):
    for name in ("notes.txt", "x.npz", "results.part"):
        (tmp_path / name).write_text("mine")
    backups = Backups(tiny(), tmp_path, keep=1)
    for step in range(3):
        backups.take(step, step, certified=True)
    backups.close()
    found = {path.name for path in tmp_path.iterdir()}
    expected = {"notes.txt", "x.npz", "results.part", "00000002.good.npz"}
    assert found == expected


def test_another_model_is_refused(written):
    _, backups, path = written
    other = Backups(language_model(), path.parent)
    before = values(other._model)
    with pytest.raises(ValueError, match="another model or optimizer: .* more"):
        other.restore(other.newest())
    same(values(other._model), before)


def test_a_full_disk_does_not_end_training(tmp_path, monkeypatch, capsys):
    backups = Backups(tiny(), tmp_path)
    backups.take(1, 1, certified=True)
    backups.close()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    backups.take(2, 2, certified=True)
    assert backups.newest().step == 1
    assert "No space left" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["00000001.good.npz"]


def test_no_memory_does_not_end_training(monkeypatch, capsys):
    backups = Backups(tiny())
    backups.take(1, 1, certified=True)

    def full(variables):
        raise MemoryError

    monkeypatch.setattr(backend, "start_copies", full)
    backups.take(2, 2, certified=True)
    assert backups.newest().step == 1
    assert "none of step 2: MemoryError" in capsys.readouterr().out


@pytest.mark.skipif(BACKEND != "jax", reason="another backend's copies")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32"])
@pytest.mark.parametrize("split", [None, (), ("a",), (None, "b"), ("b", "a")])
def test_copies_of_one_device_or_several(split, dtype):
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec

    from keras_stable.backend import jax_feeds

    array = jax.numpy.arange(64).reshape(8, 8).astype(dtype)
    value = np.array(array)
    if split is not None:
        mesh = jax.make_mesh((4, 2), ("a", "b"))
        layout = NamedSharding(mesh, PartitionSpec(*split))
        array = jax.device_put(array, layout)
    variables = [types.SimpleNamespace(value=x) for x in (array, array + 1)]
    copies = jax_feeds.start_copies(variables)
    # They take none of the device's memory. What each device has whole comes
    # from one, and a part from each that has it.
    assert all(copy.sharding.memory_kind == "pinned_host" for copy in copies)
    parts = [x.data.nbytes for copy in copies for x in copy.addressable_shards]
    holders = {("a",): 2, (None, "b"): 4}.get(split, 1)
    assert sum(parts) == 2 * holders * value.nbytes
    for variable in variables:
        variable.value.delete()
    found = jax_feeds.finish_copies(copies)
    # Pinned memory is not held any longer than need be.
    assert copies == [None, None]
    for each, expected in zip(found, (value, value + value.dtype.type(1))):
        assert each.dtype == value.dtype and each.flags.owndata
        np.testing.assert_array_equal(each, expected)


@pytest.mark.skipif(
    BACKEND != "jax" or importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu",
)
@pytest.mark.filterwarnings("ignore")
def test_copies_take_no_memory_of_tpus():
    import jax
    from jax.sharding import PartitionSpec

    from keras_stable.backend import jax_feeds

    mesh = jax.sharding.Mesh(backend.devices_of("v5e:2x2"), ("a",))
    layout = jax.sharding.NamedSharding(mesh, PartitionSpec("a"))
    given = jax.ShapeDtypeStruct((4096, 1024), "float32", sharding=layout)
    copies = jax_feeds._copies.lower([given]).compile()
    used = copies.memory_analysis()
    assert used.host_output_size_in_bytes == 4096 * 1024
    # Of the device's, a table of what is where.
    assert used.output_size_in_bytes + used.temp_size_in_bytes < 4096
    assert "all-gather" not in copies.as_text()
