"""Which path attention takes, that it is told, and that none changes a sum."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import keras_stable as ks
from keras_stable import backend
from keras_stable import telemetry
from keras_stable.attend import LENGTH
from keras_stable.attend import LOGITS
from keras_stable.attend import attend
from keras_stable.chunked_attention import attend_chunked

SMALL = (2, 8, 2, 4)
LARGE = (LOGITS // LENGTH**2 + 1, LENGTH, 1, 4)


def named(variant, shape, **how):
    return ks.attention.explain(variant, *shape, dtype="float32", **how)


def test_what_is_taken_on_a_cpu():
    assert named("baseline", SMALL).name == "keras"
    assert named("soft_temp", SMALL).name == "keras"
    for variant in ("soft_cap", "soft_clip", "qk_norm_cap"):
        assert named(variant, SMALL).name == "formula"
        assert named(variant, SMALL).why == "no kernel, and few logits"
        assert named(variant, LARGE).name == "chunked"
    assert "dropout" in named("soft_cap", LARGE, dropout=True).why
    rounded = ks.get_variant("baseline").replace(logits_dtype="bfloat16")
    assert "rounded" in named(rounded, LARGE).why
    penalty = ks.Entropy(weight=1e-2, floor=0.5)
    penalized = ks.get_variant("baseline").replace(entropy=penalty)
    assert "entropy" in named(penalized, SMALL).why
    # A length that is not known while a program is traced.
    assert named("soft_cap", (2, None, 2, 4)).name == "formula"


def qkv(shape=(2, 12, 4, 8), heads=2):
    rng = np.random.default_rng(0)
    B, T, N, H = shape
    return [
        ops.convert_to_tensor(rng.normal(size=(B, T, n, H)).astype("float32"))
        for n in (N, heads, heads)
    ]


class Kernel:
    """A kernel of no device, which is told what it is given."""

    def __init__(self, monkeypatch, measures=True):
        self.calls, self.measures = [], measures
        monkeypatch.setattr(backend, "attention_kernel", self.find)

    def find(self, query, cap, clip):
        bounded = cap is not None or clip is not None
        return ("Test", self.run) if bounded else None

    def run(self, *tensors, statistics, **how):
        self.calls.append({"statistics": statistics, **how})
        return attend_chunked(
            *tensors, statistics=statistics and self.measures, **how
        )


@pytest.mark.parametrize("name", ["soft_cap", "soft_clip", "qk_norm_cap"])
def test_a_kernel_is_given_all_of_the_formula(name, monkeypatch):
    softmax = ks.get_variant(name).softmax
    ids = np.array([[1] * 5 + [2] * 4 + [0] * 3] * 2, "int32")
    how = {"scale": 0.3, "segment_ids": ids, "sliding_window": 4}
    expected = attend(*qkv(), softmax=softmax, **how)
    kernel = Kernel(monkeypatch)
    path = ks.attention.explain(name, *SMALL)
    assert path.name == "kernel" and "Test" in path.why
    found = attend(*qkv(), softmax=softmax, **how)
    np.testing.assert_allclose(
        *map(ops.convert_to_numpy, (found, expected)), atol=1e-5
    )
    (call,) = kernel.calls
    assert call["cap"] == softmax.cap and call["sliding_window"] == 4
    assert not call["statistics"]
    if softmax.clip is not None:
        assert call["clip"] == (softmax.clip.gamma, softmax.clip.zeta)
    # Of other positions, with dropout, with a penalty: not its business.
    attend(*qkv(), scale=0.3, softmax=softmax, positions=ops.arange(12))
    assert len(kernel.calls) == 1


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("measures", [True, False])
def test_what_a_kernel_measures_is_recorded(measures, full, monkeypatch):
    softmax = ks.get_variant("qk_norm_cap").softmax

    def recorded():
        recorder = telemetry.Recorder(full)
        with telemetry.recording(recorder):
            attend(*qkv(), scale=3.0, softmax=softmax)
        (record,) = recorder.heads
        return record

    expected = recorded()
    kernel = Kernel(monkeypatch, measures)
    found = recorded()
    assert kernel.calls[0]["statistics"]
    assert found.note == "exact"
    np.testing.assert_allclose(
        *(ops.convert_to_numpy(r.value) for r in (found, expected)), rtol=1e-5
    )


def test_gpu_kernels_are_for_what_cudnn_has_not(monkeypatch):
    if keras.backend.backend() == "tensorflow":
        assert backend.attention_kernel(None, 50.0, None) is None
        return
    if keras.backend.backend() == "jax":
        from keras_stable.backend import jax_kernels as module

        monkeypatch.setattr(module, "platform", lambda: "gpu")
        name = "Pallas"
    else:
        from keras_stable.backend import torch as module

        monkeypatch.setattr(module, "get_device", lambda: "cuda:0")
        monkeypatch.setattr(module, "can_compile", lambda: True)
        name = "Triton"

    def found(head_dim=64, dtype="bfloat16", cap=None, clip=None):
        query = keras.KerasTensor((2, 100, 4, head_dim), dtype)
        kernel = backend.attention_kernel(query, cap, clip)
        return kernel and kernel[0]

    assert found(cap=50.0) == found(clip=(-0.1, 1.0)) == name
    assert found(dtype="float16", cap=50.0) == found(256, cap=50.0) == name
    assert found() is None
    assert found(dtype="float32", cap=50.0) is None
    assert found(head_dim=80, cap=50.0) == name
    assert found(head_dim=257, cap=50.0) is None


RECIPES = Path(__file__).parents[1] / "recipes"


def test_the_recipe_that_times_them(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import benchmark_attention as recipe

    result = json.loads((RECIPES / "results/attention-h200.json").read_text())
    text = (RECIPES / "README.md").read_text()
    assert recipe.table(result) in text, "The table is stale."
    assert (RECIPES / "results/attention-h200.png").exists()
    with pytest.raises(SystemExit):
        recipe.main(["--backends", "tensorflow"])
    assert "--backends has" in capsys.readouterr().err
    x = [np.array([1.0, -4.0])], [np.array([1.0, -2.0])]
    assert recipe.deviation(*x) == 1.0


@pytest.mark.parametrize("lengths", ["8", "8,16"])
def test_the_recipe_compares_shapes(lengths, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import benchmark_attention as recipe

    backend = keras.backend.backend()
    out = tmp_path / "rows.json"

    def child(command, timeout):
        """Of a length, all rows; of others, those that are asked for."""
        shapes, rows = json.loads(command[4]), []
        for i, shape in enumerate(shapes):
            for name in ("SDPA", "ours, cap"):
                entry = {"milliseconds": float(shape["length"])}
                if name != "SDPA" and not i:
                    entry = {"error_message": "no | luck\nat all"}
                rows.append({"backend": backend, "row": name, **shape, **entry})
        record = {"rows": rows, "device": "H", "git_commit": "", "versions": {}}
        Path(command[-1]).write_text(json.dumps(record))

    monkeypatch.setattr(recipe, "BACKENDS", (backend,))
    monkeypatch.setattr(recipe.subprocess, "run", child)
    flags = ["--tokens", "32", "--width", "16", "--lengths", lengths]
    flags += ["--head-dims", "4,8", "--backends", backend, "--out", str(out)]
    recipe.main(flags)
    printed = capsys.readouterr().out
    assert f"| {backend} | SDPA | 8 | 4 | 8.00 | 1.00 |  |  |  |" in printed
    assert "| failed: no / luck |" in printed
    line = f"| {backend} | SDPA | 16 | 4 | 16.00 | 1.00 | 2.00 |  |  |"
    assert (line in printed) == (lengths == "8,16")
    rows = json.loads(out.read_text())["rows"]
    for row in rows:
        assert row["batch"] * row["length"] == 32
        assert row["heads"] * row["head_dim"] == 16
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
