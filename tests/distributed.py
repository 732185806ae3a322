"""A run as one of several processes, or alone: prints what it found as JSON.

python tests/distributed.py '{"distribution": "fsdp", "processes": 2, ...}'
"""

import json
import os
import socket
import subprocess
import sys


def launch(processes, devices, **settings):
    """Runs so many processes with so many devices each; what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings |= {"processes": processes, "address": address}
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    running = [
        subprocess.Popen(
            [sys.executable, __file__, json.dumps({**settings, "process": i})],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        said = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, said):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in said]


def main(settings):
    import keras

    if settings["processes"] > 1:
        # Before anything else touches a device.
        keras.distribution.initialize(
            settings["address"], settings["processes"], settings["process"]
        )
    import numpy as np

    import keras_stable as ks

    keras.utils.set_random_seed(0)
    ks.set_distribution(
        settings["distribution"], 8, settings.get("tensor_parallel")
    )
    tokens = np.random.default_rng(0).integers(0, 32, 1200)
    data = ks.TokenBatches(tokens, 8, 8, vocabulary_size=32)
    lm = ks.StableCausalLM(
        ks.StableBackbone(32, 2, 4, 16, variant=settings["variant"])
    )
    lm.compile(ks.AdamW(1e-2))
    losses = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: losses.append(
            float(logs["batch_loss"])
        )
    )
    callbacks = [record]
    if settings.get("monitor"):
        callbacks.append(ks.StabilityMonitor(settings["monitor"], every=1))
    lm.fit(data.repeat()[:10], callbacks=callbacks, verbose=0)
    found = lm.evaluate(data[:2], return_dict=True, verbose=0)
    rows = [data[i][0]["token_ids"].tolist() for i in range(3)]
    print(
        json.dumps(
            {"losses": losses, "evaluated": found["loss"], "rows": rows}
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
