"""The kernels of GPUs, compiled for a Hopper: run by `test_triton.py`."""

import collections
import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget

from keras_stable.backend import torch_attention
from keras_stable.backend import triton_gradients
from keras_stable.backend import triton_kernels

RECIPES = Path(__file__).parents[1] / "recipes"
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
HOPPER = GPUTarget("cuda", 90, 32)
KERNELS = {
    "forward": triton_kernels.forward_kernel,
    "queries": triton_gradients.queries_kernel,
    "keys": triton_gradients.keys_kernel,
}
ARRAYS = ("Q", "K", "V", "Y", "DY", "DQ", "DK", "DV")
ROWS = ("LSE", "LARGEST", "ENTROPY", "DELTA")
NUMBERS = {"T": "i32", "window": "i32", "IDS": "*i32"}


def compiled(name, H, blocks, dtype, G=1, absent=()):
    """A kernel compiled for a Hopper, with None for arguments in `absent`."""
    kernel = KERNELS[name]
    block_t, block_s, warps, stages = blocks
    constants = {"N": 2 * G, "G": G, "H": H}
    constants |= {"BLOCK_T": block_t, "BLOCK_S": block_s}
    constants |= {x: None for x in absent if x in kernel.arg_names}
    types = {x: f"*{dtype}" for x in ARRAYS} | {x: "*fp32" for x in ROWS}
    types |= NUMBERS
    signature = {
        x: "constexpr" if x in constants else types.get(x, "fp32")
        for x in kernel.arg_names
    }
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (i,): aligned
        for i, x in enumerate(kernel.arg_names)
        if signature[x].startswith("*")
    }
    return triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, attributes),
        target=HOPPER,
        options={"num_warps": warps, "num_stages": stages},
    )


PLAIN = ("IDS", "LARGEST", "ENTROPY", "window", "rate", "gamma", "width")


@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("name", KERNELS)
def test_blocks_fit_a_hopper(name, H):
    blocks = torch_attention.BLOCKS[name][H]
    absent = ("IDS", "window", "gamma", "width")
    program = compiled(name, H, blocks, "bf16", absent=absent)
    assert program.metadata.shared <= 227 * 1024
    assert "wgmma" in program.asm["ptx"]


@pytest.mark.parametrize("H", [128, 256])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_other_blocks_fit_an_ampere(dtype, H):
    """Of the kernel that needs most."""
    blocks = torch_attention.safe_blocks(H, int(dtype[2:]) // 8)
    program = compiled("keys", H, blocks, dtype, absent=PLAIN)
    assert program.metadata.shared <= 99 * 1024


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name", KERNELS)
def test_all_features_compile(name, clip):
    blocks = torch_attention.BLOCKS[name][64]
    absent = () if clip else ("gamma", "width")
    compiled(name, 64, blocks, "bf16", G=2, absent=absent)


def inner_loop(program, file):
    """Counts of machine instructions in the loop over unmasked blocks."""
    file.write_bytes(program.asm["cubin"])
    command = [TOOLS / "nvdisasm", "-c", file]
    text = subprocess.check_output(command, text=True)
    found, labels, loops = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"\.(L_x_\d+):", line):
            labels[label[1]] = len(found)
        # After the address, perhaps a condition: the name and its modifiers.
        elif part := re.match(r"\s*/\*\w{4,}\*/\s+(?:@\S+ +)?(\w+)", line):
            found.append(part[1])
            to = re.search(r"BRA .*`\(\.(L_x_\d+)\)", line)
            if to and to[1] in labels:
                loops.append(found[labels[to[1]] :])
    # Those over masked blocks compare positions too.
    return collections.Counter(min((x for x in loops if "HGMMA" in x), key=len))


@pytest.mark.parametrize("cap", [True, False])
def test_instructions_of_a_score_are_those_that_are_documented(cap, tmp_path):
    absent = ["IDS", "window", "gamma", "width"] + ["rate"] * (not cap)
    cells = ["50" if cap else "none"]
    for name in KERNELS:
        blocks = torch_attention.BLOCKS[name][64]
        program = compiled(name, 64, blocks, "bf16", absent=absent)
        counts = inner_loop(program, tmp_path / "cubin")
        scores = blocks[0] * blocks[1] / (32 * blocks[2])  # Of a thread.
        special = counts["MUFU"] / scores
        # An exponential; with a cap another, and a reciprocal for four. What
        # is more are those of rows.
        assert 0 <= special - (2.25 if cap else 1) <= 0.2
        cells.append(f"{counts.total() / scores:.1f}, {special:.2f}")
    row = f"| {' | '.join(cells)} |"
    assert row in (RECIPES / "README.md").read_text()
