"""The weights of both peers that are written by hand.

D width, L layers, N heads, V vocabulary.
"""


def layout(config, kind, normal, norm):
    """A dictionary of weights and dictionaries, made in this order.

    Args:
        config: dictionary of sizes.
        kind: `"baseline"`, or what has norms on queries and keys.
        normal: makes a matrix of a shape, with `deviation`.
        norm: makes the dictionary of a norm of a width.
    """
    L, N, D = (config[k] for k in ("num_layers", "num_heads", "hidden_dim"))
    V = config["vocabulary"]

    def block():
        # What writes to the residual stream starts smaller in deeper models.
        small = 0.02 / (2 * L) ** 0.5
        weights = {
            "attention_norm": norm(D),
            "qkv": normal(D, 3 * D),
            "output": normal(D, D, deviation=small),
            "mlp_norm": norm(D),
            "fc1": normal(D, 4 * D),
            "fc2": normal(4 * D, D, deviation=small),
        }
        if kind != "baseline":
            weights |= {"query_norm": norm(D // N), "key_norm": norm(D // N)}
        return weights

    return {
        "embedding": normal(V, D),
        "blocks": [block() for _ in range(L)],
        "final_norm": norm(D),
        "head": normal(D, V),
    }
