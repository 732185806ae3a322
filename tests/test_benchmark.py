"""The benchmark, and that its peers are the models they stand for."""

import importlib
import json
import math
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_stable as ks

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.append(str(RECIPES))  # What `python recipes/...` has by itself.
benchmark = importlib.import_module("benchmark")
BACKEND = keras.backend.backend()
VOCABULARY = 11
SHAPES = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16}
ALL = ["baseline", "qk_norm", "qk_norm_cap"]
KINDS = {"jax": ALL, "torch": ALL, "tensorflow": []}


def weights_of(lm):
    """A model's weights in the order and shapes of the peers'."""
    found = {w.path: keras.ops.convert_to_numpy(w) for w in lm.weights}

    def norm(path):
        return {k: found[f"{path}/{k}"] for k in ("scale", "bias")}

    def block(name):
        attention = f"{name}/attention"
        qkv = [
            found[f"{attention}/{k}/kernel"] for k in ("query", "key", "value")
        ]
        weights = {
            "attention_norm": norm(f"{name}/attention_residual/pre_norm"),
            "qkv": np.concatenate(qkv, axis=1),
            "output": found[f"{attention}/output/kernel"],
            "mlp_norm": norm(f"{name}/mlp_residual/pre_norm"),
            "fc1": found[f"{name}/mlp/fc1/kernel"],
            "fc2": found[f"{name}/mlp/fc2/kernel"],
        }
        if f"{attention}/query_norm/scale" in found:
            for which in ("query_norm", "key_norm"):
                weights[which] = norm(f"{attention}/{which}")
        return weights

    return {
        "embedding": found["token_embedding/embeddings"],
        "blocks": [block(f"block_{i}") for i in range(SHAPES["num_layers"])],
        "final_norm": norm("final_norm"),
        "head": found["token_embedding/reverse_embeddings"],
    }


def model(kind):
    lm = ks.StableCausalLM.from_size(
        "1m", VOCABULARY, kind, intermediate_dim=64, **SHAPES
    )
    lm.compile(ks.AdamW(1e-2))
    return lm


def as_peer(weights):
    """The weights as the backend's own."""
    if BACKEND == "jax":
        return weights
    import torch

    return keras.tree.map_structure(
        lambda x: torch.tensor(x).requires_grad_(), weights
    )


# On a CPU it is compiled by the call, a part without gradients of leaves.
pytestmark = pytest.mark.filterwarnings(
    "ignore:flex_attention called without", "ignore:The .grad attribute"
)


@pytest.mark.parametrize("kind", KINDS[BACKEND])
def test_a_peer_is_the_same_model(kind):
    peer, lm = importlib.import_module(f"peer_{BACKEND}"), model(kind)
    rng = np.random.default_rng(0)
    for weight in lm.weights:
        # Far from the start, where biases are zeros and logits small.
        weight.assign(rng.normal(0.2, 0.5, weight.shape))
    ids = rng.integers(0, VOCABULARY, (3, 9), dtype="int32")
    inputs, targets = ids[:, :-1], ids[:, 1:]
    expected = lm.evaluate(
        {"token_ids": inputs}, targets, return_dict=True, verbose=0
    )["loss"]
    weights = weights_of(lm)
    initial = peer.initialize({"vocabulary": VOCABULARY, **SHAPES}, kind)
    shapes = [keras.tree.map_structure(np.shape, x) for x in (weights, initial)]
    assert shapes[0] == shapes[1]
    assert sum(map(np.size, keras.tree.flatten(weights))) == lm.count_params()
    if BACKEND == "jax":
        how = {"num_heads": 2, "kind": kind, "dtype": "float32"}
        found = peer.loss_of(weights, inputs, targets, **how)
    else:
        torch = importlib.import_module("torch")
        ids = [torch.tensor(x.astype("int64")) for x in (inputs, targets)]
        seen = peer.past(8) if kind == "qk_norm_cap" else None
        with torch.no_grad():
            found = peer.loss_of(
                as_peer(weights), peer.rotations(8, 8), *ids, seen=seen
            )
    assert float(found) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS[BACKEND][1:])
def test_a_peer_makes_the_same_updates(kind, monkeypatch):
    peer, lm = importlib.import_module(f"peer_{BACKEND}"), model(kind)
    start = as_peer(weights_of(lm))
    monkeypatch.setattr(peer, "initialize", lambda *args: start)
    if BACKEND == "torch":
        # Which refuses to learn on a CPU, though it could.
        flex = importlib.import_module("torch.nn.attention.flex_attention")
        monkeypatch.setattr(flex, "_validate_device", lambda *args: None)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (3, 9), "int32")
    batches = [(ids[:, :-1], ids[:, 1:])] * 6
    config = {"precision": "float32", "learning_rate": 1e-2}
    config |= {"sequence_length": 8, **SHAPES}
    found = []

    def tick(step, loss=None):
        if step:
            found.append(float(loss))

    place = "torch-eager" if BACKEND == "torch" else BACKEND
    parameters, last = peer.train(config, f"hand/{place}/{kind}", batches, tick)
    assert parameters == lm.count_params() and last == found[-1]
    expected = [
        lm.fit({"token_ids": x}, y, batch_size=3, verbose=0).history["loss"][0]
        for x, y in batches
    ]
    # torch adds Adam's epsilon elsewhere.
    atol = 1e-3 if BACKEND == "torch" else 1e-5
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    assert expected[-1] < expected[0] - 0.1


TINY = (
    "--num-layers 1 --num-heads 2 --hidden-dim 16 --batch-size 2 "
    "--vocabulary 32 --sequence-length 8 --steps 4 --blocks 2 --warmup 2"
).split()


def read(out):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(out.read_text(), parse_constant=refuse)


def test_two_rows_end_to_end(tmp_path, capsys):
    peers = {"jax": "hand/jax/baseline", "torch": "hand/torch-eager/baseline"}
    rows = [
        f"ours/{BACKEND}/baseline",
        peers.get(BACKEND, "ours/tensorflow/qk_norm"),
    ]
    out = tmp_path / "a.json"
    flags = [*TINY, "--rows", ",".join(rows), "--peak-tflops", "1"]
    benchmark.main([*flags, "--out", str(out)])
    result = read(out)
    assert result["schema"] == 1 and result["reference"] == rows[0]
    assert "keras" in result["versions"] and result["hardware"]
    assert result["command"].endswith(f"--out {out}")
    assert [entry["row"] for entry in result["rows"]] == rows
    for entry in result["rows"]:
        assert "error" not in entry, entry
        assert entry["shapes"]["sequence_length"] == 8
        assert len(entry["blocks"]) == 2 and min(entry["blocks"]) > 0
        assert entry["tokens_per_second"] == pytest.approx(
            1e3 * 16 / entry["milliseconds"]
        )
        assert entry["first_step_seconds"] > 0 and entry["peak_bytes"] > 0
        # Kernels, head, and causal attention.
        flops = 6 * (12 * 16**2 + 32 * 16) * 16 + 6 * 8 * 16 * 16
        assert entry["flops_per_step"] == flops
        assert entry["mfu"] == pytest.approx(
            flops / (1e9 * entry["milliseconds"])
        )
        # Random tokens: chance, whatever is learned in a few steps.
        assert entry["loss"] == pytest.approx(math.log(32), abs=0.2)
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert f"| {rows[1]} |" in printed and "| 1.00 |" in printed


def test_failed_rows_are_recorded(tmp_path, capsys):
    out = tmp_path / "a.json"
    row = f"ours/{BACKEND}/qk_norm"
    flags = [*TINY, "--rows", row, "--timeout", "0.01", "--out", str(out)]
    with pytest.raises(SystemExit, match="no row succeeded"):
        benchmark.main([*flags, "--sweep", "length", "--values", "8,16"])
    entries = read(out)["rows"]
    assert [entry["value"] for entry in entries] == [8, 16]
    assert all(entry["error"] == "no result within 0.01 s" for entry in entries)
    assert "failed: no result" in capsys.readouterr().out


def test_a_child_says_what_went_wrong(tmp_path, capsys):
    out = tmp_path / "a.json"
    benchmark.main(["--child", f"ours/{BACKEND}/nothing", "{}", str(out)])
    assert read(out) == {"error": "KeyError: 'precision'"}
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--rows ours/jax/qk_nrom", "--sweep depth"])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(flags.split())
    assert capsys.readouterr().err


def test_settings_and_sweeps():
    flags = "--setting h200 --sweep width --values 512,2048"
    _, rows, configs = benchmark.parse([*flags.split(), "--rows", "hand/*"], ks)
    assert rows[0] == "hand/jax/baseline" and len(set(rows)) == len(rows) == 7
    assert [c["hidden_dim"] for c in configs] == [512, 2048]
    assert [c["num_heads"] for c in configs] == [8, 32]
    assert {c["num_layers"] for c in configs} == {24}


@pytest.mark.parametrize(
    "page, name",
    [
        ("README.md", "speed-h100-jax.json"),
        ("README.md", "speed-h100-torch.json"),
        ("recipes/README.md", "speed-h100-vocabulary.json"),
        ("recipes/README.md", "speed-h100-vocabulary-torch.json"),
        ("recipes/README.md", "speed-h100-variants.json"),
        ("recipes/README.md", "speed-h100-two.json"),
        ("recipes/README.md", "speed-h200-jax.json"),
        ("recipes/README.md", "speed-h200-remat.json"),
        ("recipes/README.md", "speed-h200-cap.json"),
        ("recipes/README.md", "speed-h200-clip.json"),
        ("recipes/README.md", "scaling-h100-depth.json"),
        ("recipes/README.md", "scaling-h100-width.json"),
        ("recipes/README.md", "scaling-h100-length.json"),
        ("recipes/README.md", "scaling-h100-vocabulary.json"),
        ("recipes/README.md", "speed-cpu.json"),
    ],
)
def test_tables_are_of_the_committed_results(page, name):
    result = json.loads((RECIPES / "results" / name).read_text())
    text = (RECIPES.parent / page).read_text()
    assert benchmark.table(result) in text, f"The table in {page} is stale."
