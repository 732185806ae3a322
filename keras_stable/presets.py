"""Presets: KerasHub's directories of configuration, weights and tokenizer."""

import json
import os
from pathlib import Path

# What `save_to_preset` writes with a dtype policy in it.
_CONFIGS = ("config.json", "task.json")
_SHARDS = "model.weights.json"


def _read(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold a JSON object. Received: "
            f"{type(content).__name__}"
        )
    return content


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
            path.write_text(json.dumps(plain(_read(path)), indent=4))


def check(preset):
    """Raises `ValueError` for a local preset that is no sound one.

    Keras itself imports nothing but Keras's and registered classes, and runs
    no code that a configuration names.
    """
    directory = Path(preset)
    if not directory.is_dir():
        return
    for name in ("config.json", "task.json", "preprocessor.json", _SHARDS):
        path = directory / name
        if name != "config.json" and not path.exists():
            continue
        content = _read(path)
        if name == _SHARDS:
            files = content.get("weight_map")
            files = files.values() if isinstance(files, dict) else [None]
            for file in (f for each in files for f in _listed(each)):
                if not isinstance(file, str) or file != os.path.basename(file):
                    raise ValueError(
                        f"{path} names weights outside of the preset: {file!r}"
                    )


def _listed(value):
    return value if isinstance(value, list) else [value]


class Presets:
    """What presets add to KerasHub's models, with every error named."""

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
        check(preset)
        try:
            return super().from_preset(preset, *args, **kwargs)
        except (OSError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The preset {str(preset)!r} cannot be loaded; it is damaged "
                f"or incomplete. {type(error).__name__}: {error}"
            ) from error
