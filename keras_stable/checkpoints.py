"""Checkpoints of `transformers`: read into ours, and written.

backbone, tokenizer = read("hf:Qwen/Qwen3-0.6B")
write(backbone, tokenizer, "mine")
"""

import json
import shutil
import uuid
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
from keras import ops
from safetensors.numpy import save_file

from keras_stable import families
from keras_stable.backbone import StableBackbone
from keras_stable.choices import check_choice
from keras_stable.json_files import read_json
from keras_stable.subwords import BPETokenizer
from keras_stable.tensor_files import CONFIG
from keras_stable.tensor_files import INDEX
from keras_stable.tensor_files import SINGLE
from keras_stable.tensor_files import open_source
from keras_stable.weight_names import HEAD
from keras_stable.weight_names import match
from keras_stable.weight_names import prefix
from keras_stable.weight_names import tensors

DTYPES = {
    "float32": np.dtype("float32"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("float16"),
}
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
# Our roles of tokens, and theirs.
ROLES = {"start_token": "bos", "end_token": "eos", "pad_token": "pad"}


def read(source, *, dropout=None, dtype=None, **kwargs):
    """Reads a GPT-2, Gemma 2, Gemma 3, Qwen 3 or OLMo 2 of `transformers`.

    Tensors are read one at a time, so that it takes the memory of the model
    and of its largest tensor. Of Gemma 3 with images, the language model.

    Args:
        source: path of a directory with `config.json` and
            `model.safetensors`, or with `model.safetensors.index.json` and
            its parts; `"hf:OWNER/NAME"` on the Hugging Face Hub, perhaps with
            `"?revision=..."`; or a model of `transformers` in memory.
        dropout: float. Defaults to the configuration's.
        dtype: dtype or policy of the backbone.
        **kwargs: `remat`, `seed`, ... of `StableBackbone`, but no sizes.

    Returns:
        Tuple of a `StableBackbone` and of the `BPETokenizer` of the
        directory's `tokenizer.json`, or None without one.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if one is damaged or pickled, if the configuration is of
            another kind of model or asks for what `Variant` cannot express,
            or if the weights are not those that it describes.
        OSError: if the Hub cannot be reached.

    Example:

    >>> backbone, _ = read("hf:Qwen/Qwen3-0.6B")             # doctest: +SKIP
    """
    source = open_source(source)
    family, config, images = families.find(source.config)
    sizes, variant, rate = family.read(config, dropout)
    wanted = tensors(family, sizes, variant)
    # All is checked against the headers before a byte is allocated.
    names = match(family, wanted, source.shapes, images)
    tokenizer = _read_tokenizer(source)
    if variant.architecture.tie_embeddings and HEAD in names:
        _check_tied(source, names[wanted[0].name], names[HEAD])
    backbone = StableBackbone(
        **sizes, variant=variant, dropout=rate, dtype=dtype, **kwargs
    )
    unread = {weight.path: weight for weight in backbone.weights}
    for tensor in wanted:
        arrays = tensor.split(source.get(names[tensor.name]))
        for path, array in arrays.items():
            unread.pop(path).assign(array)
    assert not unread, sorted(unread)
    return backbone, tokenizer


def _check_tied(source, embeddings, head):
    if source.shapes[embeddings] != source.shapes[head] or not np.array_equal(
        source.get(embeddings), source.get(head), equal_nan=True
    ):
        raise ValueError(
            f"The configuration ties the head to the embeddings, but {head!r} "
            f"is not {embeddings!r}. If the head is to be read, set "
            "`tie_word_embeddings` to false in the configuration."
        )


def _read_tokenizer(source):
    """The tokenizer beside the weights, or None."""
    path = source.directory and source.directory / TOKENIZER
    if not path or not path.is_file():
        return None
    try:
        return BPETokenizer.from_file(path, **_read_roles(source))
    except ValueError as error:
        warnings.warn(f"The model has no tokenizer. {error}", stacklevel=3)
        return None


def _read_roles(source):
    """Start, end and pad token, as far as files name them."""
    path = source.directory / TOKENIZER_CONFIG
    named = read_json(path) if path.is_file() else {}
    added = read_json(source.directory / TOKENIZER).get("added_tokens")
    by_id = {
        token.get("id"): token.get("content")
        for token in (added if isinstance(added, list) else [])
        if isinstance(token, dict) and type(token.get("id")) is int
    }
    _, text, _ = families.find(source.config)
    config = {**text, **source.config}
    roles = {}
    for ours, theirs in ROLES.items():
        token = named.get(f"{theirs}_token")
        token = token.get("content") if isinstance(token, dict) else token
        # Of several end tokens the first, as `generate` of theirs pads.
        id = config.get(f"{theirs}_token_id")
        id = id[0] if isinstance(id, list) and id else id
        if token is None and type(id) is int:
            token = by_id.get(id)
        if isinstance(token, str):
            roles[ours] = token
    return roles


def write(
    backbone,
    tokenizer,
    path,
    *,
    dtype="float32",
    max_shard_size=5_000_000_000,
):
    """Writes a directory that `transformers.AutoModelForCausalLM` reads.

    Args:
        backbone: `StableBackbone` whose variant and sizes are those of a
            GPT-2, Gemma 2, Gemma 3, Qwen 3 or OLMo 2. Of LoRA the sums are
            written. Penalties (`z_loss`, `entropy`) are of training only and
            have no place in a checkpoint, nor has dropout but in GPT-2.
        tokenizer: KerasHub tokenizer or None. Its start, end and padding ids
            are written, and a `tokenizer.json` if it has `to_file`.
        path: of a directory that does not exist or is empty. It appears when
            all of it is written, or not at all.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        max_shard_size: int, bytes; larger models have several files.

    Returns:
        `pathlib.Path` of the directory.

    Raises:
        FileExistsError: if there is something at `path`.
        ValueError: if no such model is like this one, with what differs; if
            it is quantized; if a weight is too large for float16.

    Example:

    >>> backbone = StableBackbone(256, 2, 4, 64, variant="qwen3")
    >>> path = write(backbone, None, "qwen3-of-mine")        # doctest: +SKIP
    """
    check_choice(dtype, DTYPES, "dtype of a checkpoint")
    if type(max_shard_size) is not int or max_shard_size < 1:
        raise ValueError(
            "`max_shard_size` must be a positive number of bytes. Received: "
            f"{max_shard_size!r}"
        )
    path = Path(path).expanduser()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(
            f"There is something at {path}: give a new directory."
        )
    sizes = sizes_of(backbone)
    family = families.choose(sizes, backbone.variant)
    rate = backbone.get_config()["dropout"]
    config = family.write(sizes, backbone.variant, rate)
    ids = {
        f"{theirs}_token_id": getattr(tokenizer, f"{ours}_id", None)
        for ours, theirs in ROLES.items()
    }
    wanted = tensors(family, sizes, backbone.variant)
    for tensor in wanted:
        _check_plain(backbone, tensor.paths)

    # Beside it, so that renaming is one step on one file system.
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        # Without the nulls, `transformers` would take the ids of its own.
        _write_json(unfinished / CONFIG, {**config, **ids, "dtype": dtype})
        _write_tokenizer(unfinished, tokenizer, ids, sizes)
        _write_weights(
            unfinished, backbone, family, wanted, dtype, max_shard_size
        )
        if path.exists():
            path.rmdir()
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return path


def sizes_of(backbone):
    """The sizes of a backbone, with nothing left to a default."""
    config = backbone.get_config()
    names = ("vocabulary_size", "num_layers", "num_heads", "hidden_dim")
    names += ("intermediate_dim", "num_key_value_heads", "head_dim")
    sizes = {name: config[name] for name in (*names, "max_sequence_length")}
    if sizes["head_dim"] is None:
        sizes["head_dim"] = sizes["hidden_dim"] // sizes["num_heads"]
    return {name: int(size) for name, size in sizes.items()}


def _owner(backbone, path):
    """The layer of a weight's path, and the name of its attribute."""
    *names, weight = path.split("/")
    layer = backbone
    for name in names:
        if name.startswith("block_"):
            layer = backbone.transformer_layers[int(name[6:])]
        else:
            # Keras reserves the attribute `output`.
            name = "output_dense" if name == "output" else name
            layer = getattr(layer, name)
    return layer, weight


def _check_plain(backbone, paths):
    for path in paths:
        layer, _ = _owner(backbone, path)
        mode = getattr(layer, "quantization_mode", None)
        if mode is not None:
            raise ValueError(
                f"The layer of {path} is quantized, and checkpoints are not: "
                f"write the model before `quantize`. Received: {mode!r}"
            )


def _value(backbone, path):
    """One weight, float32; of LoRA the sum."""
    value = getattr(*_owner(backbone, path))
    return ops.convert_to_numpy(ops.cast(value, "float32"))


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(directory, tokenizer, ids, sizes):
    if any(id is not None for id in ids.values()):
        _write_json(directory / "generation_config.json", ids)
    if not hasattr(tokenizer, "to_file"):
        return
    tokenizer.to_file(directory / TOKENIZER)
    named = {
        f"{theirs}_token": token
        for ours, theirs in ROLES.items()
        if (token := getattr(tokenizer, ours, None)) is not None
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": sizes["max_sequence_length"],
    }
    _write_json(directory / TOKENIZER_CONFIG, {**settings, **named})


def _write_weights(directory, backbone, family, wanted, dtype, most):
    """Writes shards; of each, only its own tensors are in memory."""
    width = DTYPES[dtype].itemsize
    shards, total = [[]], 0
    room = most
    for tensor in wanted:
        size = width * int(np.prod(tensor.shape))
        if shards[-1] and size > room:
            shards.append([])
            room = most
        shards[-1].append(tensor)
        room, total = room - size, total + size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = SINGLE if len(shards) == 1 else file
        arrays = {}
        for tensor in shard:
            array = tensor.join([_value(backbone, p) for p in tensor.paths])
            head = tensor.name == HEAD
            name = tensor.name if head else prefix(family) + tensor.name
            arrays[name] = _cast(name, array, dtype)
            weight_map[name] = file
        save_file(arrays, directory / file, metadata={"format": "pt"})
        del arrays
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / INDEX, index)


def _cast(name, array, dtype):
    if dtype == "float16":
        largest = np.abs(array[np.isfinite(array)]).max(initial=0)
        if largest > np.finfo("float16").max:
            raise ValueError(
                f"{name!r} has a weight of size {largest:.3g}, too large for "
                'float16: use dtype="bfloat16".'
            )
    return array.astype(DTYPES[dtype], copy=False)
