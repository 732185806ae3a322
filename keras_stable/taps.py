"""Which layers of a model are measured, and what is wrapped around each."""

import keras

from keras_stable import telemetry
from keras_stable.backend import internals
from keras_stable.choices import check_expression


def choose(model, include=None, exclude=None):
    """Which layers are measured, and which contain one.

    Returns:
        `(chosen, scopes)`: dictionaries from layers to unique names.
    """
    names, parents = {}, {}

    def visit(layer):
        for child in internals.sublayers(layer):
            parents.setdefault(child, []).append(layer)
            if child not in names:
                name = stem = getattr(child, "path", None) or child.name
                number = 1
                while name in names.values():
                    name, number = f"{stem}_{number}", number + 1
                names[child] = name
                visit(child)

    visit(model)
    if include is None:
        chosen = [x for x in names if internals.owns_matrix(x)]
        chosen += [x for x in names if isinstance(x, keras.layers.Add)]
    else:
        pattern = check_expression(include, "include")
        chosen = [x for x in names if pattern.search(names[x])]
    scopes = containing(chosen, parents)
    if include is None:
        # A model's own layers that contain others are its blocks: what they
        # put out is the residual stream.
        chosen += [
            x
            for x in scopes
            if x in names
            and not isinstance(x, keras.Model)
            and any(isinstance(p, keras.Model) for p in parents[x])
        ]
    if exclude is not None:
        pattern = check_expression(exclude, "exclude")
        chosen = [x for x in chosen if not pattern.search(names[x])]
    if not chosen:
        some = ", ".join(list(names.values())[:8])
        raise ValueError(
            "No layer is left to measure. Received: "
            f"include={include!r}, exclude={exclude!r}. Layers of "
            f"{model.name!r} begin with: {some}"
        )
    attention = [x for x in names if isinstance(x, keras.layers.Softmax)]
    scopes = containing([*chosen, *attention], parents)
    order = [x for x in names if x in set(chosen)]
    return (
        {x: names[x] for x in order},
        {x: names.get(x, model.name) for x in scopes},
    )


def containing(layers, parents):
    """All layers that contain one of `layers`, outermost last."""
    found, queue = {}, list(layers)
    while queue:
        for parent in parents.get(queue.pop(), ()):
            if parent not in found:
                found[parent] = True
                queue.append(parent)
    return list(found)


def measured(path):
    def call(original, *args, **kwargs):
        recorder = telemetry.recorder()
        if recorder is None:
            return original(*args, **kwargs)
        # A tied embedding is called once more, as the head.
        name = f"{path}/head" if kwargs.get("reverse") else path
        if recorder.inputs and args:
            recorder.tensor(f"{name}/input", args[0])
        outputs = original(*args, **kwargs)
        recorder.tensor(name, outputs)
        return outputs

    return call


def scope(path):
    def call(original, *args, **kwargs):
        recorder = telemetry.recorder()
        if recorder is None:
            return original(*args, **kwargs)
        with recorder.within(path):
            return original(*args, **kwargs)

    return call


def softmax(cap):
    """Around a softmax of attention logits, which may have been capped."""

    def call(original, inputs, mask=None, **kwargs):
        recorder = telemetry.recorder()
        if recorder is not None and len(inputs.shape) >= 4:
            recorder.logits(inputs, mask, cap=cap, capped=True)
        return original(inputs, mask, **kwargs)

    return call


def cap_of(layer):
    """The cap that KerasHub's attention layers apply before their softmax."""
    return getattr(layer, "logit_soft_cap", None)
