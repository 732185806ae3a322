"""Tensors of others, one at a time: safetensors files and live models.

Nothing that is read is executed, and what is wrong with it is found before
the first tensor is loaded: a header names the dtypes and shapes of all.
"""

import os
import re
from pathlib import Path

# Registers bfloat16 with numpy, for `safetensors`.
import ml_dtypes  # noqa: F401
import numpy as np
import safetensors

from keras_stable.json_files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
HUB = "hf:"
_HUB_NAME = re.compile(r"hf:([\w.-]+(?:/[\w.-]+)?)(?:\?revision=([\w./-]+))?")
# Files that are downloaded: none of them can hold code.
_PATTERNS = ("*.json", "*.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
# A file name without folders, and none that a file system refuses.
_PLAIN = r"[A-Za-z0-9_.-]{1,255}"
_FLOATS = ("F64", "F32", "F16", "BF16")


class TensorFiles:
    """A directory of `config.json` and safetensors, as `transformers` writes.

    Args:
        directory: path.

    Attributes:
        config: dictionary.
        shapes: dictionary of tensor names and shapes.

    Raises:
        FileNotFoundError: if the directory, its configuration, its weights or
            one of their parts is not there.
        ValueError: if one is malformed, or the weights are pickled.
    """

    def __init__(self, directory):
        self.directory = Path(directory).expanduser()
        if not self.directory.is_dir():
            raise FileNotFoundError(
                "The checkpoint must be a directory with a config.json, a "
                'model of `transformers`, or "hf:OWNER/NAME" on the Hugging '
                f"Face Hub. Received: {str(directory)!r}"
            )
        if not (self.directory / CONFIG).is_file():
            raise FileNotFoundError(
                f"No {CONFIG} in {self.directory}, so nothing says what its "
                "weights belong to."
            )
        self.config = read_json(self.directory / CONFIG)
        self.shapes, self._files, self._listed = {}, {}, {}
        for name in self._parts():
            self._open(name)

    def _parts(self):
        """Names of the weights' files."""
        if (self.directory / SINGLE).is_file():
            return [SINGLE]
        index = self.directory / INDEX
        if not index.is_file():
            names = sorted(p.name for p in self.directory.iterdir())
            pickles = [n for n in names if n.endswith(_PICKLES)]
            if pickles:
                raise ValueError(
                    f"{self.directory} holds weights only as {pickles[0]}, a "
                    "format that may run code when it is read, so it is not. "
                    "Convert it where you trust it: `transformers`' "
                    "`model.save_pretrained(path)` writes safetensors."
                )
            raise FileNotFoundError(
                f"Neither {SINGLE} nor {INDEX} in {self.directory}."
            )
        self._listed = read_json(index).get("weight_map")
        if not isinstance(self._listed, dict) or not self._listed:
            raise ValueError(
                f"{index} has no `weight_map`, an object of tensor and file "
                "names."
            )
        for file in self._listed.values():
            plain = isinstance(file, str) and re.fullmatch(_PLAIN, file)
            if not plain or not file.endswith(".safetensors"):
                raise ValueError(
                    f"{index} must name safetensors files beside it. "
                    f"Received: {file!r}"
                )
        return list(dict.fromkeys(self._listed.values()))

    def _open(self, name):
        """Reads the header of one file; the tensors stay on disk."""
        path = self.directory / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, a part of the weights: "
                "the download is incomplete."
            )
        try:
            file = safetensors.safe_open(path, framework="numpy")
            views = {key: file.get_slice(key) for key in file.keys()}
        except Exception as error:
            raise ValueError(
                f"{path} is not a sound safetensors file; it is damaged or "
                f"incomplete. {type(error).__name__}: {error}"
            ) from error
        for key, view in views.items():
            if key in self.shapes:
                raise ValueError(
                    f"Tensor {key!r} is in two files of {self.directory}."
                )
            if view.get_dtype() not in _FLOATS:
                _check_buffer(key, view.get_dtype())
            self.shapes[key] = tuple(view.get_shape())
            self._files[key] = file
        for key, place in self._listed.items():
            if place == name and key not in views:
                raise ValueError(
                    f"{path} lacks tensor {key!r}, which {INDEX} names."
                )

    def get(self, name):
        """One tensor, a float32 array."""
        return self._files[name].get_tensor(name).astype("float32", copy=False)


def _check_buffer(name, dtype):
    # GPT-2's masks are bytes.
    if not name.endswith((".attn.bias", ".attn.masked_bias")):
        raise ValueError(
            f"Tensor {name!r} must be float64, float32, float16 or bfloat16: "
            f"quantized weights are not read. Received: {dtype}"
        )


class LiveModel:
    """A model of `transformers` in memory, with the same interface.

    Args:
        model: with `config.to_dict()` and `state_dict()`.
    """

    directory = None

    def __init__(self, model):
        self.config = model.config.to_dict()
        self._tensors = dict(model.state_dict())
        self.shapes = {}
        for name, tensor in self._tensors.items():
            if not tensor.is_floating_point():
                _check_buffer(name, tensor.dtype)
            if tensor.device.type == "meta":
                raise ValueError(
                    f"Tensor {name!r} of the model is on the meta device: it "
                    "has no values. Load the model without a device map."
                )
            self.shapes[name] = tuple(tensor.shape)

    def get(self, name):
        """One tensor, a float32 array that shares no memory with the model."""
        tensor = self._tensors[name].detach().float().cpu()
        return np.array(tensor.numpy(), copy=True)


def download(source):
    """The local directory of `"hf:OWNER/NAME"`, downloaded if need be.

    Args:
        source: string, with `"?revision=..."` for one version of it.

    Raises:
        ValueError: for a malformed name.
        ImportError: without the package huggingface_hub.
        OSError: if the Hub cannot be reached or has no such model.
    """
    parsed = _HUB_NAME.fullmatch(source)
    if parsed is None or ".." in source:
        raise ValueError(
            'A model on the Hub is "hf:OWNER/NAME", or with '
            f'"?revision=...". Received: {source!r}'
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{source!r} needs the package huggingface_hub: "
            "pip install huggingface_hub"
        ) from error
    try:
        return huggingface_hub.snapshot_download(
            parsed[1], revision=parsed[2], allow_patterns=list(_PATTERNS)
        )
    except Exception as error:
        raise OSError(
            f"Cannot download {source!r}: {type(error).__name__}: {error}. "
            "Check its name, the network and, for models behind a licence, "
            "`hf auth login`."
        ) from error


def open_source(source):
    """`TensorFiles` or `LiveModel` of what `checkpoints.read` takes.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(source, str) and source.startswith(HUB):
        return TensorFiles(download(source))
    if isinstance(source, (str, os.PathLike)):
        return TensorFiles(source)
    if hasattr(source, "state_dict") and hasattr(source, "config"):
        return LiveModel(source)
    raise TypeError(
        'A checkpoint is a directory, "hf:OWNER/NAME", or a model of '
        f"`transformers`. Received: {source!r}"
    )
