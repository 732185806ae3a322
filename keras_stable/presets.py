"""Presets: KerasHub's directories of configuration, weights and tokenizer;
and exported programs, which need none of this package to run.
"""

import json
import os
from pathlib import Path

import keras

from keras_stable import backend
from keras_stable.json_files import read_json

# Formats of `export`, by backend, for rows and batches of any length.
EXPORTS = {
    "jax": ("tf_saved_model",),
    "tensorflow": ("tf_saved_model",),
    "torch": ("torch",),
}

# What `save_to_preset` writes with a dtype policy in it.
_CONFIGS = ("config.json", "task.json")
_SHARDS = "model.weights.json"
_SIZES = "vocabulary_size", "num_layers", "hidden_dim"


def store_plainly(directory):
    """Names the dtype of the weights in a preset, not the mixed policy.

    KerasHub 0.32 cannot read a preset whose policy is called `mixed_...`. The
    variables of such a model are float32, and that is what it converts to the
    policy in force when it loads.
    """

    def plain(value):
        if isinstance(value, list):
            return [plain(v) for v in value]
        if not isinstance(value, dict):
            return value
        if value.get("class_name") == "DTypePolicy":
            name = value["config"]["name"]
            if name.startswith("mixed_"):
                return {**value, "config": {"name": "float32"}}
        return {k: plain(v) for k, v in value.items()}

    for path in (Path(directory, name) for name in _CONFIGS):
        if path.exists():
            path.write_text(json.dumps(plain(read_json(path)), indent=4))


def check(preset):
    """Raises for a local preset that is no sound one.

    Keras itself imports nothing but Keras's and registered classes, and runs
    no code that a configuration names.

    Raises:
        FileNotFoundError: if there is no configuration.
        ValueError: if a file is no JSON object, if weights are elsewhere, or
            if there cannot be as many of them as a configuration asks for.
    """
    directory = Path(preset)
    if not directory.is_dir():
        return
    stored = sum(f.stat().st_size for f in directory.glob("model*.weights.*"))
    _check_sizes(directory / "config.json", stored)
    for name in ("task.json", "preprocessor.json"):
        if (directory / name).exists():
            _check_sizes(directory / name, stored)
    if (directory / _SHARDS).exists():
        _check_shards(directory / _SHARDS)


def _check_sizes(path, stored):
    """Keras allocates a model before it looks at the weights."""
    waiting = [read_json(path)]
    while waiting:
        config = waiting.pop()
        waiting += [v for v in config.values() if isinstance(v, dict)]
        sizes = [config.get(name) for name in _SIZES]
        if set(map(type, sizes)) != {int}:
            continue
        vocabulary, layers, width = sizes
        # Of 4 bits each, if they are quantized.
        if width * (vocabulary + layers * width) > 2 * stored:
            raise ValueError(
                f"{path} asks for a model larger than the preset's weights, "
                f"which are {stored} bytes: {dict(zip(_SIZES, sizes))}"
            )


def _check_shards(path):
    files = read_json(path).get("weight_map")
    files = files.values() if isinstance(files, dict) else [None]
    for each in files:
        for file in each if isinstance(each, list) else [each]:
            if not isinstance(file, str) or file != os.path.basename(file):
                raise ValueError(
                    f"{path} names weights outside of the preset: {file!r}"
                )


class Presets:
    """What presets and export add to KerasHub's models, with named errors."""

    def save_to_preset(self, preset_dir, *args, **kwargs):
        """Saves a preset: see `keras_hub.models.Backbone.save_to_preset`.

        `keras_hub` itself loads it, once `keras_stable` is imported.
        """
        super().save_to_preset(preset_dir, *args, **kwargs)
        store_plainly(preset_dir)

    @classmethod
    def from_preset(cls, preset, *args, **kwargs):
        """Loads a preset: see `keras_hub.models.Backbone.from_preset`.

        Raises:
            ValueError: if it is damaged, incomplete, or of another model.
        """
        try:
            check(preset)
            return super().from_preset(preset, *args, **kwargs)
        except (ImportError, ValueError):
            raise
        except Exception as error:
            raise ValueError(
                f"The preset {str(preset)!r} cannot be loaded; it is damaged "
                f"or incomplete. {type(error).__name__}: {error}"
            ) from error

    def export(self, filepath, format=None, **kwargs):
        """Writes a program that runs without Keras: see `keras.Model.export`.

        It takes `{"token_ids": ids}`, int32 (B, T) of any B and T. Attention is
        causal, so rows may be padded at their end and need no mask.

        Args:
            filepath: path; on torch it must end in `.pt2`.
            format: `"tf_saved_model"` on jax and tensorflow (TensorFlow must be
                installed), `"torch"` on torch: their defaults.
            **kwargs: of `keras.Model.export`.

        Raises:
            ValueError: for a format that the backend does not export to.
        """
        name = keras.backend.backend()
        format = format or EXPORTS[name][0]
        if format not in EXPORTS[name]:
            raise ValueError(
                f"On {name}, a language model exports to "
                f"{' or '.join(EXPORTS[name])}. Received: format={format!r}. "
                "Saved files and presets load on all backends: "
                + "; ".join(f"{k} writes {v[0]}" for k, v in EXPORTS.items())
            )
        ids = keras.layers.InputSpec(
            shape=(None, None), dtype="int32", name="token_ids"
        )
        options = {"input_signature": [{"token_ids": ids}]}
        options |= backend.export_options({"token_ids": 2})
        return super().export(filepath, format=format, **(options | kwargs))
