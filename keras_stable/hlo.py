"""Compiled programs as text, XLA's HLO: what is in them, how often it runs."""

import collections
import dataclasses
import math
import re

# Bytes of an element; other types (tokens, opaque) have none.
_SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}
_SIZES |= {f"{kind}8": 1 for kind in ("s", "u")}
_SIZES |= {"bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_SIZES |= {f"{k}{n}": n // 8 for k in ("s", "u") for n in (16, 32, 64)}

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass
class Instruction:
    """One line of a program."""

    name: str
    shape: str
    opcode: str
    operands: list
    attributes: str
    is_root: bool


def arrays(shape):
    """`[(dtype, dimensions, in_main_memory)]` of a shape or of a tuple."""
    found = []
    for kind, sizes, layout in _ARRAY.findall(shape):
        # "S(1)": the chip's own fast memory, or another but the main one.
        elsewhere = re.search(r"S\([1-9]", layout or "")
        dims = [int(size) for size in sizes.split(",") if size]
        found.append((kind, dims, not elsewhere))
    return found


def size(shape, main_memory=False):
    """Bytes of a shape; with `main_memory` of what lies there alone."""
    return sum(
        _SIZES.get(kind, 0) * math.prod(dims)
        for kind, dims, main in arrays(shape)
        if main or not main_memory
    )


def _balanced(text, start):
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    return len(text)


_BEGIN = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


def _instruction(line):
    begin = _BEGIN.match(line)
    if begin is None:
        return None
    rest = line[begin.end() :]
    end = _balanced(rest, 0) + 1 if rest[0] == "(" else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, bracket, _ = rest.partition("(")
    if not bracket:
        return None
    close = _balanced(rest, len(opcode))
    operands = re.findall(r"%([\w.\-]+)", rest[len(opcode) : close])
    if not operands and opcode != "constant":
        # Printed without the sign.
        operands = re.findall(r"\b([a-zA-Z][\w.\-]*)", rest[:close])[1:]
    if opcode in ("constant", "parameter"):
        operands = [rest[len(opcode) + 1 : close]]
    return Instruction(
        begin[2], shape, opcode, operands, rest[close + 1 :], bool(begin[1])
    )


def read(text):
    """The computations of a program.

    Returns:
        `(computations, entry)`: a dictionary from names to lists of
        `Instruction`s, and the name of the one that runs.
    """
    found, entry, current = {}, None, None
    for line in text.splitlines():
        header = None if line.startswith(" ") else _COMPUTATION.match(line)
        if header:
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None:
            instruction = _instruction(line)
            if instruction is not None:
                current.append(instruction)
            elif current and not line.startswith("}"):
                # Attributes may have several lines.
                current[-1].attributes += line
    return found, entry


def called(instruction, name):
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    return found and found[1]


def _passes(instruction, computations):
    """How often a loop runs; None where the text does not say."""
    known = re.search(r'known_trip_count[^\d]*"?(\d+)', instruction.attributes)
    if known:
        return int(known[1])
    # `lax.scan` counts from 0 while less than a constant; a loop that the
    # compiler has unrolled counts in steps of two.
    condition = computations.get(called(instruction, "condition"), [])
    by_name = {one.name: one for one in condition}
    for one in condition:
        if one.opcode == "compare" and "direction=LT" in one.attributes:
            count, bound = (by_name.get(x) for x in one.operands)
            if bound is not None and bound.opcode == "constant":
                step = _step(instruction, count, computations)
                return math.ceil(int(bound.operands[0]) / step)
    constants = [one for one in condition if one.opcode == "constant"]
    whole = [one for one in constants if one.shape.startswith("s32[]")]
    return int(whole[0].operands[0]) if len(whole) == 1 else None


def _step(loop, count, computations):
    """What is added to a loop's counter in each pass."""
    index = count and re.search(r"index=(\d+)", count.attributes)
    body = computations.get(called(loop, "body"), [])
    by_name = {one.name: one for one in body}
    root = next((one for one in body if one.is_root), None)
    if not index or root is None or root.opcode != "tuple":
        return 1
    added = by_name.get(root.operands[int(index[1])])
    if added is None or added.opcode != "add":
        return 1
    for operand in added.operands:
        one = by_name.get(operand)
        if one is not None and one.opcode == "constant":
            return int(one.operands[0])
    return 1


def runs(computations, entry):
    """How often each computation runs, and whether its lines touch memory.

    Returns:
        `(times, inside, unknown)`: a dictionary from names to counts; the
        names of those inside of a fusion; how many loops have no known length
        and count as one pass.
    """
    times = collections.defaultdict(float)
    inside, unknown = set(), 0
    # Computations are printed before those that call them.
    times[entry] = 1.0
    for name in reversed(list(computations)):
        if not times[name]:
            continue
        for one in computations[name]:
            count = times[name]
            names = []
            if one.opcode == "while":
                passes = _passes(one, computations)
                unknown += passes is None
                count *= 1 if passes is None else passes
                names = [called(one, "body"), called(one, "condition")]
            elif one.opcode == "conditional":
                text = re.search(
                    r"branch_computations=\{([^}]*)", one.attributes
                )
                names = re.findall(r"[\w.\-]+", text[1]) if text else []
                names += [called(one, "true_computation")]
                names += [called(one, "false_computation")]
            elif one.opcode in ("fusion", "call", "async-start"):
                names = [called(one, "calls") or called(one, "to_apply")]
            for other in filter(None, names):
                times[other] += count
                if one.opcode == "fusion" or name in inside:
                    inside.add(other)
    return times, inside, unknown
