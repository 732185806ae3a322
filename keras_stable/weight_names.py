"""The weights of shipped models: their names and shapes, and ours.

D model dimension, V vocabulary, F inner dimension, N query heads, K key and
value heads, H head dimension.
"""

import re
from dataclasses import dataclass

import numpy as np

# The models' own copies of what has no weight: masks, rotary frequencies.
_BUFFERS = re.compile(
    r"h\.\d+\.attn\.(bias|masked_bias)|"
    r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
)
_IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Tensor:
    """One tensor of theirs, and what it is of ours.

    Args:
        name: theirs, without the prefix of the whole model.
        shape: theirs.
        paths: of our weights; several are theirs side by side (GPT-2 keeps
            query, key and value in one kernel).
        transposed: whether theirs is (out, in), as in `torch.nn.Linear`.
    """

    name: str
    shape: tuple[int, ...]
    paths: tuple[str, ...]
    transposed: bool = False

    def split(self, array):
        """`{path: array}` of our weights."""
        array = array.T if self.transposed else array
        return dict(zip(self.paths, np.split(array, len(self.paths), axis=-1)))

    def join(self, arrays):
        """The inverse: their array of ours, a list in the order of `paths`."""
        array = np.concatenate(arrays, axis=-1)
        return np.ascontiguousarray(array.T if self.transposed else array)


def prefix(family):
    """What the names of a whole model begin with, but for the head's."""
    return "transformer." if family.name == "gpt2" else "model."


def tensors(family, sizes, variant):
    """All tensors of a model, a list of `Tensor`.

    Args:
        family: `Family`.
        sizes: dictionary of the sizes of `StableBackbone`, all given.
        variant: `Variant` that the family can say.
    """
    make = _gpt2 if family.name == "gpt2" else _llama
    found = list(make(family, sizes, variant))
    if not variant.architecture.tie_embeddings:
        shape = (sizes["vocabulary_size"], sizes["hidden_dim"])
        path = "token_embedding/reverse_embeddings"
        found.append(Tensor(HEAD, shape, (path,), transposed=True))
    return found


def _gpt2(family, sizes, variant):
    V, D = sizes["vocabulary_size"], sizes["hidden_dim"]
    F, P = sizes["intermediate_dim"], sizes["max_sequence_length"]
    yield Tensor("wte.weight", (V, D), ("token_embedding/embeddings",))
    yield Tensor("wpe.weight", (P, D), ("position_embedding/embeddings",))
    # Kernels are (in, out), as ours.
    linears = {
        "attn.c_attn": (D, 3 * D, ("query", "key", "value"), "attention"),
        "attn.c_proj": (D, D, ("output",), "attention"),
        "mlp.c_fc": (D, F, ("fc1",), "mlp"),
        "mlp.c_proj": (F, D, ("fc2",), "mlp"),
    }
    for i in range(sizes["num_layers"]):
        for theirs, (rows, columns, names, part) in linears.items():
            paths = [f"block_{i}/{part}/{name}" for name in names]
            for end, ours, shape in (
                ("weight", "kernel", (rows, columns)),
                ("bias", "bias", (columns,)),
            ):
                yield Tensor(
                    f"h.{i}.{theirs}.{end}",
                    shape,
                    tuple(f"{path}/{ours}" for path in paths),
                )
        for ours, theirs in family.norms.items():
            yield from _layer_norm(f"h.{i}.{theirs}", f"block_{i}/{ours}", D)
    yield from _layer_norm("ln_f", "final_norm", D)


def _layer_norm(theirs, ours, width):
    yield Tensor(f"{theirs}.weight", (width,), (f"{ours}/scale",))
    yield Tensor(f"{theirs}.bias", (width,), (f"{ours}/bias",))


def _llama(family, sizes, variant):
    V, D = sizes["vocabulary_size"], sizes["hidden_dim"]
    F, H = sizes["intermediate_dim"], sizes["head_dim"]
    queries = sizes["num_heads"] * H
    keys = sizes["num_key_value_heads"] * H
    yield Tensor("embed_tokens.weight", (V, D), ("token_embedding/embeddings",))
    # Kernels are (out, in).
    linears = {
        "self_attn.q_proj": (queries, D, "attention/query"),
        "self_attn.k_proj": (keys, D, "attention/key"),
        "self_attn.v_proj": (keys, D, "attention/value"),
        "self_attn.o_proj": (D, queries, "attention/output"),
        "mlp.gate_proj": (F, D, "mlp/gate"),
        "mlp.up_proj": (F, D, "mlp/fc1"),
        "mlp.down_proj": (D, F, "mlp/fc2"),
    }
    norms = {theirs: (ours, D) for ours, theirs in family.norms.items()}
    if variant.qkv_norm.qk is not None:
        full = variant.qkv_norm.scope == "full"
        norms["self_attn.q_norm"] = (
            "attention/query_norm",
            queries if full else H,
        )
        norms["self_attn.k_norm"] = ("attention/key_norm", keys if full else H)
    biased = variant.architecture.use_bias == "attention"
    for i in range(sizes["num_layers"]):
        for theirs, (out, into, path) in linears.items():
            name, path = f"layers.{i}.{theirs}", f"block_{i}/{path}"
            kernel = (f"{path}/kernel",)
            yield Tensor(f"{name}.weight", (out, into), kernel, transposed=True)
            if biased and theirs.startswith("self_attn"):
                yield Tensor(f"{name}.bias", (out,), (f"{path}/bias",))
        for theirs, (path, width) in norms.items():
            path = f"block_{i}/{path}/scale"
            yield Tensor(f"layers.{i}.{theirs}.weight", (width,), (path,))
    yield Tensor("norm.weight", (D,), ("final_norm/scale",))


def match(family, wanted, shapes, images=False):
    """Finds each tensor among the names of a checkpoint.

    Names may or may not have the prefix of the whole model. Buffers, a head
    that is tied and, with `images`, all that is not of the language model are
    left out.

    Args:
        family: `Family`.
        wanted: list of `Tensor`.
        shapes: dictionary of their names and shapes.
        images: bool, whether the model also takes images.

    Returns:
        Dictionary from `Tensor.name` to the full name; the head has one in
        it even if it is tied.

    Raises:
        ValueError: if a tensor is missing, there twice, unexpected, or has
            another shape.
    """
    found = {}
    for full in shapes:
        if images and _IMAGES.match(full):
            continue
        name = full
        if images:
            name = name.replace("language_model.", "", 1)
        # Images nest it: "model.language_model.embed_tokens.weight".
        name = name.removeprefix(prefix(family))
        if _BUFFERS.fullmatch(name):
            continue
        if name in found:
            raise ValueError(
                f"The checkpoint has one tensor twice, as {found[name]!r} and "
                f"{full!r}."
            )
        found[name] = full
    expected = {tensor.name: tensor for tensor in wanted}
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(
            f"The checkpoint lacks {len(missing)} tensors that its "
            f"configuration asks for: {_some(missing)}."
        )
    unexpected = [
        full
        for name, full in found.items()
        if name not in expected and name != HEAD
    ]
    if unexpected:
        raise ValueError(
            f"The checkpoint has {len(unexpected)} tensors that are no part "
            f"of {family.name} with its configuration: {_some(unexpected)}."
        )
    for name, tensor in expected.items():
        if tuple(shapes[found[name]]) != tensor.shape:
            raise ValueError(
                f"{found[name]!r} must have the shape {tensor.shape}, by the "
                f"configuration. Received: {tuple(shapes[found[name]])}"
            )
    return found


def _some(names, most=5):
    names = sorted(names)
    more = ", ..." if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
