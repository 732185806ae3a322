"""The only place that imports jax, torch or tensorflow.

One module a backend, with the same functions; which is used is decided once,
by Keras's own choice (`KERAS_BACKEND`).
"""

import keras

if keras.backend.backend() == "jax":
    from keras_stable.backend.jax import *
elif keras.backend.backend() == "torch":
    from keras_stable.backend.torch import *
elif keras.backend.backend() == "tensorflow":
    from keras_stable.backend.tensorflow import *
else:
    raise ImportError(
        "keras_stable trains with jax, torch or tensorflow. Set KERAS_BACKEND "
        "to one of them before Python starts. Received: "
        f"{keras.backend.backend()!r}"
    )
