"""From strings to token ids and back, on KerasHub's conventions."""

import keras
import keras_hub

from keras_stable.backbone import StableBackbone


@keras.saving.register_keras_serializable("keras_stable")
class StableCausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """From strings to packed ids for `StableCausalLM`, and back.

    A prompt to `generate` begins with the tokenizer's start token, if it has
    one, as in all of KerasHub.

    Args:
        tokenizer: a KerasHub tokenizer.
        sequence_length: int. Defaults to 1024.
        add_start_token, add_end_token: bool, whether training samples get
            them. Default to False: a string is a piece of text, not a whole
            document. `TokenBatches` packs documents with separators.
    """

    backbone_cls = StableBackbone

    def __init__(
        self,
        tokenizer,
        sequence_length=1024,
        add_start_token=False,
        add_end_token=False,
        **kwargs,
    ):
        super().__init__(
            tokenizer,
            sequence_length,
            add_start_token=add_start_token,
            add_end_token=add_end_token,
            **kwargs,
        )


def preprocessor_of(tokenizer):
    """One with this tokenizer; None for none."""
    return None if tokenizer is None else StableCausalLMPreprocessor(tokenizer)
