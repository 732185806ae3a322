"""What detection_runs.py trains: data, models, and how they are broken.

Nothing here imports Keras before it is used: it comes as an argument.
"""

import math

# Data: functions of the step that give a batch, and the loss by chance.

SEQUENCE = {"full": 128, "small": 64, "tiny": 32}


def text(run, ks):
    documents, _ = ks.split(ks.load_corpus("python"))
    tokens = ks.pack(documents[:400], ks.ByteTokenizer())
    length = SEQUENCE[run["scale"]]
    batches = ks.TokenBatches(
        tokens, run["batch_size"], length, seed=run["seed"]
    )
    repeated = batches.repeat()
    return lambda step: repeated[step], ks.unigram_entropy(tokens)


def padded_text(run, ks):
    import numpy as np

    batch, chance = text(run, ks)

    def padded(step):
        x, y = batch(step)
        ids = x["token_ids"]
        return {"token_ids": ids, "padding_mask": np.ones_like(ids)}, y

    return padded, chance


def plain_text(run, ks):
    batch, chance = text(run, ks)

    def plain(step):
        x, y = batch(step)
        return x["token_ids"], y

    return plain, chance


def gratings(run, ks):
    """Ten directions of waves under noise: 16 x 16 pixels."""
    import numpy as np

    grid = np.mgrid[:16, :16] - 7.5

    def batch(step):
        rng = np.random.default_rng([run["seed"], step])
        y = rng.integers(0, 10, run["batch_size"])
        angle, phase = np.pi * y / 10, rng.uniform(0, 6.3, y.shape)
        wave = np.cos(angle)[:, None, None] * grid[0]
        wave = wave + np.sin(angle)[:, None, None] * grid[1]
        x = np.sin(wave + phase[:, None, None])
        x = x + rng.normal(0, 0.7, x.shape)
        return x[..., None].astype("float32"), y.astype("int32")

    return batch, math.log(10)


def waves(run, ks):
    """A sum of sines of eight numbers, of variance one, and some noise."""
    import numpy as np

    direction = np.random.default_rng(7).normal(0, 0.5, (8, 16))

    def sample(rng, count):
        x = rng.normal(0, 1, (count, 8))
        return x, np.sin(x @ direction).sum(-1, keepdims=True)

    scale = sample(np.random.default_rng(8), 10**5)[1].std()

    def batch(step):
        rng = np.random.default_rng([run["seed"], step])
        x, y = sample(rng, run["batch_size"])
        y = y / scale + rng.normal(0, 0.1, y.shape)
        return x.astype("float32"), y.astype("float32")

    return batch, 1.0


# Targets that are permuted: which share of those of a step, t in [0, 1).
TARGETS = {
    None: lambda t, rng: 0.0,
    "bad_batches": lambda t, rng: float(rng.random() < 0.02),
    "burst": lambda t, rng: 0.5 if 0.5 <= t < 0.54 else 0.0,
    "noise": lambda t, rng: 0.15,
}


def spoil(run, batch):
    """The batches, with some targets permuted among themselves."""
    import numpy as np

    def spoiled(step):
        x, y = batch(step)
        rng = np.random.default_rng([run["seed"], step, 1])
        share = TARGETS[run["targets"]](step / run["steps"], rng)
        flat = y.reshape(-1).copy()
        chosen = rng.random(flat.size) < share
        flat[chosen] = rng.permutation(flat[chosen])
        return x, flat.reshape(y.shape)

    return spoiled


# Models.


def lm(run, keras, ks):
    return ks.StableCausalLM.from_size(
        "1m",
        ks.ByteTokenizer().vocabulary_size(),
        run["variant"],
        num_layers=run["layers"],
        num_heads=run["width"] // 32,
        hidden_dim=run["width"],
        intermediate_dim=4 * run["width"],
        seed=run["seed"],
    )


def gpt2(run, keras, ks):
    import keras_hub

    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=ks.ByteTokenizer().vocabulary_size(),
        num_layers=run["layers"],
        num_heads=run["width"] // 32,
        hidden_dim=run["width"],
        intermediate_dim=4 * run["width"],
        max_sequence_length=SEQUENCE[run["scale"]],
    )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


def lstm(run, keras, ks):
    layers, size = keras.layers, ks.ByteTokenizer().vocabulary_size()
    return keras.Sequential(
        [
            keras.Input((SEQUENCE[run["scale"]],), dtype="int32"),
            layers.Embedding(size, run["width"]),
            layers.LSTM(run["width"], return_sequences=True),
            layers.Dense(size, dtype="float32"),
        ]
    )


def conv(run, keras, ks):
    layers = keras.layers
    blocks = [
        layer
        for width in (32, 64)
        for layer in (
            layers.Conv2D(width, 3, padding="same", activation="relu"),
            layers.Conv2D(width, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
        )
    ]
    head = [layers.Flatten(), layers.Dense(10, dtype="float32")]
    return keras.Sequential([keras.Input((16, 16, 1)), *blocks, *head])


def mlp(run, keras, ks):
    dense = keras.layers.Dense
    hidden = [dense(run["width"], activation="gelu") for _ in range(3)]
    head = dense(1, dtype="float32")
    return keras.Sequential([keras.Input((8,)), *hidden, head])


KINDS = {
    "lm": (text, lm),
    "gpt2": (padded_text, gpt2),
    "lstm": (plain_text, lstm),
    "conv": (gratings, conv),
    "mlp": (waves, mlp),
}


# What is done to a model half-way.


def nan_weight(model):
    matrix = next(v for v in model.trainable_variables if len(v.shape) > 1)
    value = matrix.numpy()
    value[(0,) * value.ndim] = math.nan
    matrix.assign(value)


def hot_softmax(model):
    """Attention logits 300 times as large."""
    for variable in model.trainable_variables:
        if "query" in variable.path:
            variable.assign(variable * 300.0)


def broken_norms(model):
    """Gains of norms 30 times as large."""
    for variable in model.trainable_variables:
        if "norm" in variable.path and len(variable.shape) == 1:
            variable.assign(variable * 30.0)


CHANGES = {
    "nan_weight": nan_weight,
    "hot_softmax": hot_softmax,
    "broken_norms": broken_norms,
}
