"""What a compiled program computes, reads, writes and sends.

XLA's own count of operations takes each loop for one pass, and knows nothing
of kernels. Here every instruction counts as often as it runs.
"""

import collections
import math
import re

from keras_stable import hlo

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    "collective-permute",
)
# These move nothing: names of what is there, or the end of what began before.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("while", "conditional", "call", "after-all", "partition-id", "iota"),
    *("opt-barrier", "async-done", "copy-done", "async-update"),
    *(f"{kind}-done" for kind in COLLECTIVES),
}
# Matrix products of (T, H) with (H, T), or as large, in a Splash kernel.
_KERNELS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def _window(text, rank):
    """Size, stride, padding below and dilations of each spatial dimension."""
    found = {}
    body = re.search(r"window=\{([^}]*)\}", text)
    for part in body[1].split() if body else []:
        key, _, value = part.partition("=")
        found[key] = [[int(x) for x in v.split("_")] for v in value.split("x")]
    one, none = [[1]] * rank, [[0, 0]] * rank
    return zip(
        found.get("size", one),
        found.get("stride", one),
        found.get("pad", none),
        found.get("lhs_dilate", one),
        found.get("rhs_dilate", one),
    )


def _valid(size, out, length, stride, low, base, window):
    """Pairs of a place in the output and one in the window that meet input."""
    count = 0
    for k in range(size):
        # length of input, dilated
        offset = k * window - low
        step, last = stride, (length - 1) * base
        for i in range(out) if base > 1 else ():
            at = i * step + offset
            count += 0 <= at <= last and at % base == 0
        if base == 1:
            first = max(0, -(offset // step) if offset < 0 else 0)
            end = min(out - 1, (last - offset) // step)
            count += max(0, end - first + 1)
    return count


def _flops(one, shapes):
    """Of the multiplications and additions of a matrix product."""
    name = re.sub(r"[.\d]+$", "", one.name)
    if one.opcode == "custom-call":
        for kernel, products in _KERNELS.items():
            if name.startswith(kernel):
                return products * _attention(one)
        return 0.0
    if one.opcode not in ("dot", "convolution"):
        return 0.0
    (_, out, _), *_ = hlo.arrays(one.shape)
    left, right = (hlo.arrays(shapes[x])[0][1] for x in one.operands[:2])
    if one.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)", one.attributes)
        axes = [int(x) for x in axes[1].split(",") if x] if axes else []
        return 2.0 * math.prod(out) * math.prod(left[a] for a in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    lhs, rhs, result = labels.groups()
    spatial = sorted(x for x in rhs if x.isdigit())
    total = 2.0 * right[rhs.index("i")]
    total *= out[result.index("b")] * out[result.index("f")]
    windows = _window(one.attributes, len(spatial))
    for axis, (size_, stride, pad, base, dilation) in zip(spatial, windows):
        total *= _valid(
            *(size_[0], out[result.index(axis)], left[lhs.index(axis)]),
            *(stride[0], pad[0], base[0], dilation[0]),
        )
    return total


def _attention(kernel):
    """Operations of one product of a Splash kernel, visited blocks alone."""
    text = re.search(
        r"operand_layout_constraints=\{(.*?\})\}", kernel.attributes
    )
    found = hlo.arrays(text[1]) if text else []
    grid = next((d for k, d, _ in found if k[0] in "su" and len(d) == 3), None)
    query = next((d for k, d, _ in found if "f" in k and len(d) == 4), None)
    if grid is None or query is None:
        return 0.0
    B, N, T, H = query
    # Blocks of a causal mask; a window visits `width` of them in each row.
    rows, width = max(grid[1:]), min(grid[1:])
    blocks = sum(min(i + 1, width) for i in range(rows))
    return 2.0 * B * N * H * blocks * (T / rows) ** 2


def group(text):
    """Devices of a collective's first group, by their place in the program.

    Returns:
        List of ints; empty where all devices are one group.
    """
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return [int(x) for x in listed[1].split(",")]
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        return [int(x) for x in re.findall(r"\d+", pairs[1])[:2]]
    iota = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    )
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text)
    if mesh:
        axes = re.findall(r"'(\w+)'=(\d+)", mesh[1])
        sizes, wanted = [int(n) for _, n in axes], mesh[2]
        places = [0]
        for i, (name, _) in enumerate(axes):
            if f"'{name}'" in wanted:
                stride = math.prod(sizes[i + 1 :])
                steps = range(0, stride * sizes[i], stride)
                places = [place + step for place in places for step in steps]
        return places
    if iota:
        shape, dims = ([int(x) for x in iota[i].split(",")] for i in (1, 2))
        order = [int(x) for x in (iota[3] or "").split(",") if x]
        order = order or list(range(len(dims)))
        # The first group: the first places of the transposed numbers.
        strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
        places = []
        for flat in range(shape[-1]):
            place = 0
            for axis in reversed(order):
                flat, index = divmod(flat, dims[axis])
                place += index * strides[axis]
            places.append(place)
        return places
    return []


def _collective(one, shapes, within):
    """`(kind, bytes)`: of what each device of a group ends or begins with."""
    kind = one.opcode.removesuffix("-start")
    result = hlo.size(one.shape)
    given = sum(hlo.size(shapes[x]) for x in one.operands)
    if one.opcode.endswith("-start") and kind != "all-reduce":
        # Their results hold what was given, too.
        result = max(result - given, 0)
        if kind == "collective-permute":
            result = given
    if kind == "all-reduce" and within.startswith("all-reduce-scatter"):
        return "reduce-scatter", given
    return kind, given if kind == "reduce-scatter" else result


def _traffic(one, shapes, computations):
    """Bytes that an instruction reads and writes in the main memory."""
    if one.opcode in _FREE:
        return 0
    written = hlo.size(one.shape, main_memory=True)
    if one.opcode == "copy-start":
        return written
    read = [hlo.size(shapes[x], main_memory=True) for x in one.operands]
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return written + min(read[0], written)
    if one.opcode == "dynamic-update-slice":
        return 2 * read[1]
    if one.opcode == "fusion":
        body = computations.get(hlo.called(one, "calls"), [])
        return _fusion(one, body, written, read)
    return written + sum(read)


def _fusion(one, body, written, read):
    """What a fusion touches of operands that it only takes slices of."""
    by_name = {i.name: i for i in body}
    users = collections.defaultdict(list)
    for i in body:
        for x in i.operands:
            users[x].append(i)
    updated = 0
    for i in body:
        if i.opcode != "parameter":
            continue
        number, using = int(i.operands[0]), users[i.name]
        if number >= len(read) or not using:
            continue
        if all(u.opcode in ("dynamic-slice", "slice", "gather") for u in using):
            parts = sum(hlo.size(u.shape) for u in using)
            read[number] = min(read[number], parts)
        elif all(
            u.opcode == "dynamic-update-slice" and u.operands[0] == i.name
            for u in using
        ):
            # Written in place: neither read nor written but for the update.
            updated += read[number] - sum(
                hlo.size(by_name[u.operands[1]].shape)
                for u in using
                if u.operands[1] in by_name
            )
            read[number] = 0
    return max(written - updated, 0) + sum(read)


def summarize(text):
    """What one device does in one run of a program.

    Returns:
        Dictionary: `flops` of matrix products and of attention kernels;
        `memory_traffic`, bytes read and written in the main memory by
        instructions outside of fusions; `collectives`, a list of dictionaries
        with `kind`, `devices` (of the first group), `count` and `bytes`, those
        of the whole, gathered or reduced, tensor; `unknown_loops`, which count
        as one pass each.
    """
    computations, entry = hlo.read(text)
    times, inside, unknown = hlo.runs(computations, entry)
    flops = traffic = 0.0
    # By channel: an asynchronous one is written where it begins, where it
    # goes on beside other work, and where it ends.
    channels = {}
    for name, lines in computations.items():
        count = times[name]
        if not count:
            continue
        shapes = {one.name: one.shape for one in lines}
        for one in lines:
            flops += count * _flops(one, shapes)
            if name not in inside:
                traffic += count * _traffic(one, shapes, computations)
            if one.opcode.removesuffix("-start") in COLLECTIVES:
                kind, amount = _collective(one, shapes, name)
                key = (kind, tuple(group(one.attributes)))
                channel = re.search(r"channel_id=(\d+)", one.attributes)
                channel = channel[1] if channel else one.name
                before = channels.get((channel, key), (0, 0))
                channels[channel, key] = max(before, (int(count), amount))
    moved = collections.defaultdict(lambda: [0, 0.0])
    for (_, key), (count, amount) in channels.items():
        moved[key][0] += count
        moved[key][1] += count * amount
    return {
        "flops": flops,
        "memory_traffic": traffic,
        "collectives": [
            {"kind": kind, "devices": list(devices), "count": n, "bytes": b}
            for (kind, devices), (n, b) in sorted(moved.items())
        ],
        "unknown_loops": unknown,
    }
