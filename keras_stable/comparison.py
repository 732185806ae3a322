"""What a report says of all its runs together.

The run that a run is compared with, the stability table, what differs between
configurations.
"""

import collections

import numpy as np

from keras_stable.curves import pack

IDENTITY = ("variant", "label", "learning_rate", "seed", "tokens", "steps")


def growth(digest, reference=None):
    """log2 of output norms relative to a reference, for each kind of layer.

    ```
    G_l(t) = log2(l2_l(t) / l2_l(first table))            without `reference`
    G_l(t) = log2(l2_l(t) / l2_l'(t))                     l' of `reference`
    ```

    Args:
        digest: `Digest`, with tables.
        reference: `Digest` of the run at a tenth of the rate. Of its tables
            that of the nearest step counts.

    Returns:
        Dictionary from kinds to `(names, values)`, array (L, T); or None if
        there is nothing to be compared.
    """
    if not len(digest.steps):
        return None
    found = {}
    for kind, (names, norms) in digest.norms.items():
        base = norms[:, :1]
        if reference is not None:
            other = reference.norms.get(kind, (None, None))
            if other[0] != names:
                continue
            distance = np.abs(digest.steps[:, None] - reference.steps[None])
            near = distance.argmin(axis=1)
            # A run that was stopped early says nothing of later steps.
            far = distance.min(axis=1) > max(1, np.diff(digest.steps).max())
            base = np.where(far, np.nan, other[1][:, near])
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log2(norms / base)
        found[kind] = names, np.where(np.isfinite(values), values, np.nan)
    return found or None


def growths(digest, tenth=None):
    """What the page shows of growth, and the largest against the tenth.

    Args:
        digest: `Digest`.
        tenth: that of the run of the same seed at a tenth of the rate.

    Returns:
        `(shown, largest)`: dictionary for the page with `"first"` and
        `"tenth"`; and how many times the norm of the tenth the largest is in
        the last table, None without.
    """
    shown, largest = {}, None
    references = {"first": None} | ({"tenth": tenth} if tenth else {})
    for name, reference in references.items():
        found = growth(digest, reference)
        if found is None:
            continue
        kinds = {
            kind: {"names": names, "z": pack(values, "i2")}
            for kind, (names, values) in found.items()
        }
        shown[name] = {"steps": digest.steps.tolist(), "kinds": kinds}
        if reference is not None:
            shown[name]["rate"] = reference.facts["rate"]
        last = [v[:, -1] for kind, (_, v) in found.items() if kind != "Other"]
        last = np.concatenate(last) if last else np.array([np.nan])
        if reference is not None and np.isfinite(last).any():
            largest = float(2 ** np.nanmax(last))
    return shown, largest


def compare_configs(digests):
    """What is the same in all configurations, and what is not.

    Identity (label, rate, seed) is left out: the report's tables begin with
    it.

    Returns:
        Dictionary with `"common"`: list of `[name, value]`; `"keys"`: the
        names that differ; `"usual"`: the most frequent value of each; and
        `"values"`: for each run a list.
    """
    configs = [
        {k: v for k, v in d.config.items() if k not in IDENTITY}
        for d in digests
    ]
    read = [config for config in configs if config]
    names = list(dict.fromkeys(name for config in read for name in config))
    common, keys, usual = [], [], []
    for name in names:
        counts = collections.Counter(config.get(name) for config in read)
        value, count = counts.most_common(1)[0]
        if count == len(read):
            common.append([name, value])
        else:
            keys.append(name)
            usual.append(value)
    values = [[config.get(key) for key in keys] for config in configs]
    return {"common": common, "keys": keys, "usual": usual, "values": values}
