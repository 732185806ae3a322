"""Keras's own layer checks for every public layer.

They build, call eagerly and symbolically, compare the two, serialise, train
for a step, and repeat under dtype policies.
"""

import keras
import pytest
from keras.src import testing

import keras_stable as ks

LAYERS = {
    # class: (arguments, trainable weights, non-trainable weights, seeds)
    ks.LayerNorm: ({}, 2, 0, 0),
    ks.RMSNorm: ({"offset": 1.0}, 1, 0, 0),
    ks.L2Norm: ({}, 1, 0, 0),
    ks.SigmaReparamDense: ({"units": 8}, 3, 1, 0),
    ks.PositionEmbedding: ({"max_sequence_length": 6}, 1, 0, 0),
    ks.CausalSelfAttention: (
        {"num_heads": 2, "variant": "qkv_norm", "dropout": 0.1},
        10,
        1,
        1,
    ),
    ks.MLP: ({"variant": "sigma_reparam"}, 4, 2, 0),
    ks.TransformerBlock: (
        {"num_heads": 2, "variant": "layer_scale", "num_key_value_heads": 1},
        12,
        0,
        0,
    ),
}


# The check itself fits on a generator with `shuffle` left at its default.
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning")
@pytest.mark.parametrize("cls", LAYERS, ids=lambda c: c.__name__)
def test_keras_layer_checks(cls):
    kwargs, trainable, others, seeds = LAYERS[cls]
    # Seeds are weights to Keras, but no non-trainable ones to this check.
    testing.TestCase().run_layer_test(
        cls,
        init_kwargs=kwargs,
        input_shape=(2, 5, 8),
        expected_output_shape=(2, 5, 8),
        expected_num_trainable_weights=trainable,
        expected_num_non_trainable_weights=others - seeds,
        expected_num_seed_generators=seeds,
        supports_masking=True,
        run_mixed_precision_check=True,
        run_training_check=True,
        assert_built_after_instantiation=False,
    )


@pytest.mark.parametrize("cls", LAYERS, ids=lambda c: c.__name__)
def test_config_is_complete(cls):
    layer = cls(**LAYERS[cls][0], name="x", dtype="mixed_bfloat16")
    config = layer.get_config()
    again = cls.from_config(config)
    assert again.get_config() == config
    assert again.dtype_policy == layer.dtype_policy
    assert keras.saving.get_registered_name(cls).startswith("keras_stable>")
