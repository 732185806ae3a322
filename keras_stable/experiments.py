"""Experiments by name: the paper's questions, and those of its reviewers.

An experiment declares arms, the flags of `recipes/pretrain.py` that all of
them share, learning rates and seeds: nothing here runs. Two arms of one
experiment differ in what the question asks about and in nothing else.

    import keras_stable as ks

    for arm in ks.EXPERIMENTS["cap"].arms:
        print(arm.label, arm.variant.softmax.cap)

To add one, add an entry.
"""

import math

from keras_stable.arms import SETUPS
from keras_stable.arms import Arm
from keras_stable.arms import Experiment
from keras_stable.choices import Clip
from keras_stable.choices import Learned
from keras_stable.choices import Placement
from keras_stable.choices import QKVNorm
from keras_stable.variants import PAPER
from keras_stable.variants import get

_CPU, _GPU, _PAPER = SETUPS.values()
_THREE = (0, 1, 2)

_baseline, _qk = get("baseline"), get("qk_norm")
_BRANCH = Placement(branch="layer")


def _named(*names):
    return tuple(Arm(name) for name in names)


def _each(labels, **changes):
    """Every one of some variants with every one of some flags."""
    return tuple(
        Arm(f"{label}.{change}" if change else label, label, flags)
        for label in labels
        for change, flags in changes.items()
    )


def _factorial():
    """Pre-norm or none before attention, times norms on its projections."""
    norms = {
        "none": QKVNorm(),
        "qk": QKVNorm(qk="layer"),
        "qkv": QKVNorm(qk="layer", v="layer"),
        "v": QKVNorm(v="layer"),
    }
    return tuple(
        Arm(
            f"{before}+{name}",
            _baseline.replace(attention=Placement(pre=pre), qkv_norm=norm),
        )
        for before, pre in (("pre", "layer"), ("bare", None))
        for name, norm in norms.items()
    )


def _caps():
    caps = (5.0, 10.0, 15.0, 20.0, 30.0, 50.0, math.inf)
    for base, name, values in (
        (_qk, "qk+", caps),
        (_baseline, "", (5.0, 15.0, 50.0, math.inf)),
        # Without gains |z| is at most sqrt(head_dim): the cap does nothing.
        (_qk.replace(qk="layer_plain"), "qk_plain+", (50.0, math.inf)),
    ):
        for cap in values:
            label = f"{name}cap={cap:g}"
            given = None if cap == math.inf else cap
            yield Arm(label, base.replace(cap=given))


def _edges():
    """Two methods in other schedules, with other optimizers and norms."""
    flags = {
        "": {},
        "constant": {"schedule": "constant"},
        "warmup=0": {"warmup_steps": 0},
        "warmup=200": {"warmup_steps": 200},
        "beta_2=0.999": {"beta_2": 0.999},
        "decay=0": {"weight_decay": 0.0},
        "unclipped": {"clip_norm": "none"},
    }
    names = "qk_norm", "qkv_norm"
    yield from _each(names, **flags)
    values = {"epsilon=1e-3": {"epsilon": 1e-3}, "full": {"scope": "full"}}
    for label, change in values.items():
        for name in names:
            yield Arm(f"{name}.{label}", get(name).replace(**change))


def _stack():
    """Every method on top of QK norm and z-loss."""
    yield Arm("baseline")
    yield Arm("qk_norm")
    for name in PAPER:
        variant = get(name)
        # With QK norm, the baseline and soft_cap become the other two.
        if name not in ("qk_norm", "qk_norm_cap"):
            label = "qk+z" if name == "baseline" else f"{name}+qk+z"
            yield Arm(label, variant.replace(qk="layer", z_loss=1e-4))


_ALL = (
    Experiment(
        "cpu-sensitivity",
        "How much does the final loss depend on the learning rate, with and "
        "without norms on queries and keys, in a model that fits a laptop?",
        _named("baseline", "qk_norm", "qkv_norm", "qk_norm_cap"),
        rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        seeds=_THREE,
        # To the end, also what is lost: LR sensitivity compares final losses.
        flags=_CPU | {"policy": "observe"},
        why="The effect of arXiv 2309.14322 in half an hour on two cores.",
    ),
    Experiment(
        "paper-lr",
        "At which learning rate does each of the ten methods diverge?",
        _named(*PAPER),
        rates="paper",
        flags=_PAPER,
        why="The paper's first table; `PUBLISHED` has its numbers.",
    ),
    Experiment(
        "paper-ppl",
        "Which of the ten methods has the lowest perplexity at a base rate "
        "where all are stable?",
        _named(*PAPER),
        rates=(3e-4,),
        seeds=_THREE,
        flags=_PAPER | {"steps": 2000, "warmup_steps": 100},
        why="The paper's second table, for all methods; intervals over seeds "
        "and over tokens.",
    ),
    Experiment(
        "paper-norms",
        "Which layers' inputs, weights, outputs and gradients grow when a run "
        "diverges, against the same seed at a tenth of the rate?",
        _named("baseline", "qk_norm", "qkv_norm"),
        rates=(8e-4, 2e-3, 8e-3, 2e-2),
        flags=_PAPER
        | {"steps": 1000, "every": 10, "inputs": True, "policy": "observe"},
        why="The paper's diagnosis: QKV, Proj and FC2 put out over twice as "
        "much by step 1000, FC1 does not.",
    ),
    Experiment(
        "cap",
        "Does a cap on attention logits help, at which value, and on top of "
        "QK norm?",
        _caps(),
        rates="anchor",
        seeds=_THREE,
        flags=_GPU,
        why="The paper has 50 alone.",
    ),
    Experiment(
        "temperature",
        "How far does a factor on the logits move the edge?",
        tuple(
            Arm(f"factor={x:g}", _baseline.replace(temperature=x))
            for x in (0.125, 0.25, 0.5, 1.0, 2.0)
        ),
        rates="anchor",
        seeds=_THREE,
        flags=_GPU,
        why="The paper has 0.5 alone.",
    ),
    Experiment(
        "clip",
        "Is it the stretch above one, the stretch below zero, or its size "
        "that makes the clipped softmax differ?",
        (
            Arm("baseline"),
            Arm("soft_clip"),
            *(
                Arm(label, _baseline.replace(clip=Clip(zeta=zeta, **below)))
                for label, zeta, below in (
                    ("above", 1.03, {"gamma": 0.0}),
                    ("below", 1.0, {"gamma": -0.03}),
                    ("below.tenth", 1.0, {"gamma": -0.003}),
                    ("alpha=4", 1.0, {"alpha": 4.0}),
                    ("alpha=12", 1.0, {"alpha": 12.0}),
                )
            ),
        ),
        rates="anchor",
        seeds=_THREE,
        flags=_GPU,
        why="The paper has (1.03, -0.03) alone; the method's authors use "
        "-12 / T for language models.",
    ),
    Experiment(
        "layer-scale",
        "Does LayerScale depend on its initial value, which the paper does "
        "not report?",
        (
            Arm("baseline"),
            *(
                Arm(f"init={x:g}", _baseline.replace(gain=Learned(x)))
                for x in (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
            ),
            Arm("fixed", _baseline.replace(gain="1/sqrt(2L)")),
        ),
        rates="anchor",
        seeds=_THREE,
        flags=_GPU,
        why="At a rate of 1e-2 an initial value of 1e-5 is gone in a step.",
    ),
    Experiment(
        "qkv-factorial",
        "Is it the norms on queries, keys and values that help, or that the "
        "pre-norm is gone?",
        _factorial(),
        rates="anchor",
        seeds=_THREE,
        flags=_GPU,
        why="QKV norm changes two things at once: its reviewers' question. "
        "pre+none is the baseline, pre+qk QK norm, bare+qkv QKV norm.",
    ),
    Experiment(
        "where",
        "Are norms on queries and keys necessary, or do others do as well?",
        (
            Arm("baseline"),
            Arm("qk_norm"),
            Arm("proj", _baseline.replace(attention=_BRANCH)),
            Arm("fc2", _baseline.replace(mlp=_BRANCH)),
            Arm("proj+fc2", _baseline.replace(branch="layer")),
            Arm("v", _baseline.replace(v="layer")),
        ),
        rates="anchor",
        seeds=_THREE,
        flags=_GPU,
        why="That QK norm suffices does not make queries and keys the cause.",
    ),
    Experiment(
        "placebo",
        "Does any norm help, or any parameters, wherever they are?",
        (
            Arm("baseline"),
            Arm("qk_norm"),
            # The norm without its parameters, parameters without a norm.
            Arm("qk_plain", _qk.replace(qk="layer_plain")),
            Arm("gains", _baseline.replace(gain=Learned(1.0))),
            # As many parameters: two norms of 2D, one of 4D without a bias.
            Arm("proj+fc2", _baseline.replace(branch="layer")),
            Arm(
                "fc1",
                _baseline.replace(mlp=Placement(inner="layer_no_bias")),
            ),
        ),
        rates="anchor",
        seeds=_THREE,
        flags=_GPU,
        why="A lower perplexity may come of more norms. FC1 is where the "
        "paper sees no growth.",
    ),
    Experiment(
        "precision",
        "Is the edge one of bfloat16, and of which part of it?",
        (
            *_each(
                ("baseline", "qk_norm"),
                float32={"precision": "float32"},
                mixed_bfloat16={"precision": "mixed_bfloat16"},
                bfloat16={"precision": "bfloat16"},
                mixed_float16={"precision": "mixed_float16"},
            ),
            *(
                Arm(
                    f"{name}.logits",
                    get(name).replace(logits_dtype="bfloat16"),
                    {"precision": "mixed_bfloat16"},
                )
                for name in ("baseline", "qk_norm")
            ),
        ),
        rates="anchor",
        seeds=_THREE,
        flags=_GPU,
        why="Two reviewers' question. `logits` rounds attention logits too.",
    ),
    Experiment(
        "confounds",
        "Do beta_2, warm-up, weight decay or clipping move the edge as far "
        "as QK norm does?",
        _each(
            ("baseline", "qk_norm"),
            **{
                "": {},
                "beta_2=0.99": {"beta_2": 0.99},
                "beta_2=0.999": {"beta_2": 0.999},
                "epsilon=1e-15": {"epsilon": 1e-15},
                "warmup=10": {"warmup_steps": 10},
                "warmup=1000": {"warmup_steps": 1000},
                "decay=0": {"weight_decay": 0.0},
                "independent": {"decay": "independent", "weight_decay": 1e-4},
                "unclipped": {"clip_norm": "none"},
            },
        ),
        rates="anchor",
        seeds=_THREE,
        flags=_GPU,
        why="The paper's optimizer is unknown to us.",
    ),
    Experiment(
        "edges",
        "Which part of the training decides how far QK norm and QKV norm can "
        "be pushed, and which goes further?",
        tuple(_edges()),
        rates=(6e-2, 8e-2, 0.12, 0.18),
        seeds=_THREE,
        flags=_PAPER,
        why="At the paper's blocks QK norm trains at twice the rate at which "
        "the paper has it diverge, and QKV norm at no higher one.",
    ),
    Experiment(
        "sizes",
        "Does the edge fall as models grow, and do norms keep it?",
        _each(
            ("baseline", "qk_norm", "qkv_norm", "qk_norm_cap"),
            **{size: {"size": size} for size in ("1m", "3m", "10m", "30m")},
        ),
        rates="anchor",
        seeds=_THREE,
        flags=_GPU,
        why="The paper has one size: four reviewers' question.",
    ),
    Experiment(
        "stack",
        "What does each method add to QK norm with z-loss?",
        _stack(),
        rates="anchor",
        seeds=_THREE,
        flags=_GPU,
        why="What is trained with today has these two already.",
    ),
    Experiment(
        "restarts",
        "Do warm restarts, jumps of the learning rate, cost stability at 2, 4 "
        "and 8 times a base rate?",
        _each(
            ("baseline", "qk_norm"),
            **{
                "": {},
                "restarts": {"cycles": 4},
                "lower": {"cycles": 4, "peak_decay": 0.5},
                "rewarmed": {"cycles": 4, "rewarmup_steps": 50},
            },
        ),
        rates=(3e-3, 6e-3, 12e-3, 24e-3),
        seeds=_THREE,
        flags=_GPU,
        why="A stressor: nothing published says that they stabilise.",
    ),
)
EXPERIMENTS = {experiment.name: experiment for experiment in _ALL}


def to_markdown():
    """The lab book's table of experiments."""
    names = "name question arms rates seeds".split()
    rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for e in EXPERIMENTS.values():
        sizes = len(e.arms), len(e.rates), len(e.seeds)
        numbers = " | ".join(map(str, sizes))
        rows.append(f"| `{e.name}` | {e.question} | {numbers} |")
    return "\n".join(rows)
