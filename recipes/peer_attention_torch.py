"""Attention on GPUs with PyTorch: SDPA, flex_attention, ours, the formula."""

import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention


def rows(scale, cap, clip, attend):
    """As `peer_attention_jax.rows`."""

    def formula(q, k, v, cap=None, clip=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        z = scale * (q @ k.transpose(-1, -2)).float()
        z = z if cap is None else cap * torch.tanh(z / cap)
        T = q.shape[2]
        seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        p = torch.softmax(z.masked_fill(~seen, -1e30), dim=-1)
        if clip is not None:
            p = ((clip[1] - clip[0]) * p + clip[0]).clamp(0.0, 1.0)
        return (p.to(v.dtype) @ v).transpose(1, 2)

    def stock(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return y.transpose(1, 2)

    masks = {}

    def flex(q, k, v):
        T = q.shape[1]
        if T not in masks:
            masks[T] = create_block_mask(
                lambda b, h, t, s: t >= s, None, None, T, T, q.device
            )

        def capped(z, b, h, t, s):
            return cap * torch.tanh(z / cap)

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = flex_attention(q, k, v, capped, masks[T], scale)
        return y.transpose(1, 2)

    def ours(q, k, v, **how):
        y, rows = attend(q, k, v, scale, **how)
        if rows is not None:
            for x in rows:
                x.amax((0, 2))
        return y

    def step(function):
        # Each has two lengths, and few are compiled in one process else.
        torch.compiler.reset()
        run = torch.compile(function, dynamic=False)

        def call(tensors):
            *leaves, dy = tensors
            y = run(*leaves)
            return y, torch.autograd.grad(y, leaves, dy)

        return call

    def make(arrays, dtype):
        found = [
            torch.as_tensor(x, dtype=getattr(torch, dtype), device="cuda")
            for x in arrays
        ]
        return [*(x.requires_grad_() for x in found[:-1]), found[-1]]

    functions = {
        "SDPA": (stock, {}),
        "flex_attention, cap": (flex, {}),
        "ours": (ours, {}),
        "ours, cap": (ours, {"cap": cap}),
        "ours, cap, statistics": (ours, {"cap": cap, "statistics": True}),
        "ours, clip": (ours, {"clip": clip}),
        "formula, cap": (formula, {"cap": cap}),
        "formula, clip": (formula, {"clip": clip}),
    }

    def wait(_):
        torch.cuda.synchronize()

    device = torch.cuda.get_device_name()
    return functions, step, make, wait, formula, device
