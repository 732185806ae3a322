"""Train transformers at the edge of stability, in Keras 3, on any backend."""

# Variants: methods as values.
from keras_stable.choices import Architecture as Architecture
from keras_stable.choices import Clip as Clip
from keras_stable.choices import Learned as Learned
from keras_stable.choices import Placement as Placement
from keras_stable.choices import QKVNorm as QKVNorm
from keras_stable.choices import SigmaReparam as SigmaReparam
from keras_stable.choices import Softmax as Softmax
from keras_stable.variants import VARIANTS as VARIANTS
from keras_stable.variants import Variant as Variant
from keras_stable.variants import get as get_variant

# Layers.
from keras_stable.norms import NORMS as NORMS
from keras_stable.norms import L2Norm as L2Norm
from keras_stable.norms import LayerNorm as LayerNorm
from keras_stable.norms import RMSNorm as RMSNorm
from keras_stable.linear import SigmaReparamDense as SigmaReparamDense
from keras_stable.positions import PositionEmbedding as PositionEmbedding
from keras_stable.attention import CausalSelfAttention as CausalSelfAttention
from keras_stable.mlp import MLP as MLP
from keras_stable.block import TransformerBlock as TransformerBlock
