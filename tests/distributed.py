"""A run as one of several processes, or alone: prints what it found as JSON.

python tests/distributed.py '{"distribution": "fsdp", "processes": 2, ...}'
"""

import contextlib
import json
import os
import socket
import subprocess
import sys


def launch(processes, devices, backend="jax", script=__file__, **settings):
    """Runs so many processes with so many devices each; what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings |= {"processes": processes, "address": address}
    settings |= {"logical_devices": devices}
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # As `torchrun` sets them.
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": address.partition(":")[2],
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    running = [
        subprocess.Popen(
            [sys.executable, script, json.dumps({**settings, "process": i})],
            env={**environment, "RANK": str(i), "LOCAL_RANK": str(i)},
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


def train(settings):
    """Ten steps and an evaluation: losses, telemetry, rows that were fed."""
    import keras
    import numpy as np

    import keras_stable as ks

    keras.utils.set_random_seed(0)
    ks.set_distribution(
        settings["distribution"],
        8,
        settings.get("tensor_parallel"),
        settings.get("devices"),
    )
    tokens = np.random.default_rng(0).integers(0, 32, 1200)
    data = ks.TokenBatches(tokens, 8, 8, vocabulary_size=32)
    lm = ks.StableCausalLM(
        ks.StableBackbone(32, 2, 8, 64, variant=settings["variant"])
    )
    lm.compile(ks.AdamW(1e-3))
    tables, losses = [], []
    # Not under `tf.distribute`, which refuses.
    watched = keras.backend.backend() == "jax"
    with ks.watch(lm) if watched else contextlib.nullcontext() as watch:
        end = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: (
                losses.append(float(logs["batch_loss"])),
                watched
                and tables.extend(s.tensors.tolist() for s in watch.read()),
            )
        )
        lm.fit(data.repeat()[:10], callbacks=[end], verbose=0)
    found = {"losses": losses, "tables": tables}
    found["evaluated"] = lm.evaluate(data[:2], verbose=0)[0]
    found["rows"] = [data[i][0]["token_ids"].tolist() for i in range(3)]
    return lm, found


def main(settings, run=lambda settings: train(settings)[1]):
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        (cpu,) = tf.config.list_physical_devices("CPU")
        parts = [tf.config.LogicalDeviceConfiguration()]
        tf.config.set_logical_device_configuration(
            cpu, parts * settings["logical_devices"]
        )
    if settings["processes"] > 1 and keras.backend.backend() == "jax":
        # Before anything else touches a device.
        keras.distribution.initialize(
            settings["address"], settings["processes"], settings["process"]
        )
    print(json.dumps(run(settings)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
