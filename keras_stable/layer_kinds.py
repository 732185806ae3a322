"""In what the layers of a shipped model differ: windows, rotary positions.

`transformers` gives every layer one of two kinds, and each kind a window and
the parameters of its positions; ours are tuples that are cycled over layers.
"""

from keras_stable.config_keys import mapping
from keras_stable.config_keys import number
from keras_stable.config_keys import refuse
from keras_stable.config_keys import whole

FULL, SLIDING = "full_attention", "sliding_attention"


def cycle(values):
    """The shortest tuple that gives `values` when cycled, or its one value.

    Example:

    >>> cycle([4, None, 4]), cycle([4, 4])
    ((4, None), 4)
    """
    values = tuple(values)
    for period in range(1, len(values) + 1):
        if all(v == values[i % period] for i, v in enumerate(values)):
            return values[0] if period == 1 else values[:period]


def expand(value, num_layers):
    """The inverse of `cycle`: a list with one value for each layer."""
    value = value if isinstance(value, tuple) else (value,)
    return [value[i % len(value)] for i in range(num_layers)]


def read_windows(config, num_layers, slides):
    """The kind of each layer, and `sliding_window` as ours.

    Args:
        config: dictionary.
        num_layers: int.
        slides: function `(config, layer)`, whether a layer has a window where
            `layer_types` does not say so; None if no layer can.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        layers = range(num_layers)
        sliding = [slides is not None and slides(config, i) for i in layers]
        kinds = [SLIDING if s else FULL for s in sliding]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        what = f"null or a list of {num_layers} names, one for each layer"
        raise refuse("layer_types", kinds, what)
    allowed = (FULL, SLIDING) if slides else (FULL,)
    for kind in kinds:
        if kind not in allowed:
            names = " and ".join(map(repr, allowed))
            raise refuse("layer_types", kind, f"a list of {names}")
    windows = {FULL: None}
    if SLIDING in kinds:
        if config.get("use_sliding_window") is False:
            raise refuse("use_sliding_window", False, "true for windows")
        windows[SLIDING] = whole(config, "sliding_window")
    return kinds, cycle([windows[kind] for kind in kinds])


def write_windows(windows, num_layers):
    """The inverse: two keys. Of different windows it has the first."""
    windows = expand(windows, num_layers)
    kinds = [SLIDING if window else FULL for window in windows]
    first = next(filter(None, windows), None)
    return {"layer_types": kinds, "sliding_window": first}


def _rotary(given, theta):
    """(wavelength, factor) of one object of rotary parameters."""
    given = {"rope_theta": theta, **given}
    kind = given.pop("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear"):
        raise refuse("rope_type", kind, "'default' or 'linear'")
    # The last belongs to other kinds and is written for all.
    known = {"type", "rope_theta", "factor", "original_max_position_embeddings"}
    for key in set(given) - known:
        if key != "partial_rotary_factor" or given[key] != 1:
            raise refuse(f"rope_parameters.{key}", given[key], "absent")
    if kind == "default" and given.setdefault("factor", 1.0) != 1:
        raise refuse("factor", given["factor"], "1 for rope_type 'default'")
    return number(given, "rope_theta"), number(given, "factor")


def read_rotary(config, kinds, wavelengths):
    """`rope_wavelength` and `rope_factor` as ours.

    Both styles are read: `rope_parameters`, for each kind of layer where they
    differ, and `rope_theta`, `rope_local_base_freq` and `rope_scaling`.

    Args:
        config: dictionary.
        kinds: list of str, of each layer.
        wavelengths: default wavelengths: one for all layers, or one for those
            without and one for those with a window.
    """
    scaling = mapping(config, "rope_scaling")
    given = mapping(config, "rope_parameters")

    def default(key, wavelength):
        return wavelength if config.get(key) is None else config[key]

    theta = default("rope_theta", wavelengths[0])
    if len(wavelengths) == 1:
        # As `transformers` does, where both are given.
        pair = _rotary(scaling or given, theta)
        pairs = {FULL: pair, SLIDING: pair}
    else:
        if not set(given) <= {FULL, SLIDING}:
            names = f"an object of {FULL!r} and {SLIDING!r}"
            raise refuse("rope_parameters", given, names)
        local = default("rope_local_base_freq", wavelengths[1])
        full = {**mapping(given, FULL), **scaling}
        pairs = {
            FULL: _rotary(full, theta),
            SLIDING: _rotary(mapping(given, SLIDING), local),
        }
    return {
        "rope_wavelength": cycle([pairs[kind][0] for kind in kinds]),
        "rope_factor": cycle([pairs[kind][1] for kind in kinds]),
    }


def write_rotary(architecture, kinds, wavelengths):
    """The inverse, in both styles: `transformers` 4 reads the second only.

    A kind has what its first layer has.
    """
    found = {}
    if len(wavelengths) == 1:
        kinds = [FULL] * len(kinds)
    for kind, theta, factor in zip(
        kinds,
        expand(architecture.rope_wavelength, len(kinds)),
        expand(architecture.rope_factor, len(kinds)),
    ):
        linear = {"rope_type": "linear", "factor": float(factor)}
        kept = {"rope_type": "default"} if factor == 1 else linear
        found.setdefault(kind, {**kept, "rope_theta": float(theta)})
    for kind, theta in zip((FULL, SLIDING), wavelengths):
        absent = {"rope_type": "default", "rope_theta": theta}
        found.setdefault(kind, absent)
    full = dict(found[FULL])
    old = {"rope_theta": full.pop("rope_theta")}
    if full["rope_type"] != "default":
        old["rope_scaling"] = full
    if len(wavelengths) == 1:
        return {"rope_parameters": found[FULL], **old}
    old["rope_local_base_freq"] = found[SLIDING]["rope_theta"]
    return {"rope_parameters": found, **old}
