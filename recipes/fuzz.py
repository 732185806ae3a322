r"""Files of strangers: does a reader do anything but read, or fail oddly?

Question: given damaged and hostile files, does every reader of this package
either read them or raise what its docstring says, run no code, unpickle
nothing and write nowhere? Each reader is given small sound files, made here
and then damaged: bytes flipped, cut, spliced; values of JSON replaced by
others (of other types, huge, nested ten thousand deep, paths to elsewhere);
headers of tensors and arrays rewritten; files replaced by pickles, links and
directories. While it reads, an audit hook of the interpreter notes whatever
starts a program, opens a connection, looks up a pickled class or writes
outside of the directory.

    python recipes/fuzz.py --out recipes/results/fuzz.json

A hundred thousand inputs, a quarter of an hour on one core. Each reader has a
process, so that a crash of one is a line in the table. Expected: no line under
"unexpected".
"""

import argparse
import collections
import contextlib
import copy
import faulthandler
import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import hypothesis
import numpy as np
from hypothesis import strategies as st

# Values that have broken readers of JSON, elsewhere or here.
NASTY = [
    *(None, True, -1, 0, 2**31, 2**63, 10**400, -0.0, 1e-320, 1e308),
    *(float("nan"), float("inf"), "", "nan", "\0", "\ud800", "\u202e", "é"),
    *("..", "../../stolen", "/etc/passwd", "~", "a" * 5000, "hf:a/b", "con"),
    *([], {}, [[]], {"": {}}, [None] * 300, list(range(2000))),
    # Keras's ways to say code, a class and a tensor.
    {"class_name": "__lambda__", "config": {"value": ["4wAAAA==", None, None]}},
    {"class_name": "Popen", "module": "subprocess", "config": {"args": "ls"}},
    {"class_name": "function", "module": "os", "config": "system"},
    {
        "class_name": "Lambda",
        "module": "keras.layers",
        "config": {"function": {"class_name": "__lambda__", "config": {}}},
    },
    {
        "class_name": "__numpy__",
        "config": {"value": [1, 2], "dtype": "object"},
    },
]
# What none of the readers may do, in the words of `sys.addaudithook`.
FORBIDDEN = {
    *("pickle.find_class", "marshal.loads", "code.__new__", "os.system"),
    *("subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.spawn"),
    *("socket.connect", "socket.getaddrinfo", "urllib.Request", "os.chmod"),
    *("os.putenv", "signal.pthread_kill", "os.kill", "ctypes.dlopen"),
}
# And these outside: the places of the path that is changed, and of the open
# directory that it is relative to.
WRITING = {
    "os.mkdir": (0, 2),
    "os.rename": (1, 3),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.link": (1, 3),
    "os.symlink": (1, 2),
    "os.truncate": (0, None),
    "os.utime": (0, 3),
}
# The readers, and their shares of the inputs: less where one takes long.
SHARES = {
    "variant": 250,
    "run.json": 250,
    "health.jsonl": 160,
    "corpus": 160,
    "tokenizer.json": 60,
    "tokenizer.json, unigram": 40,
    "SentencePiece model": 50,
    "run that is continued": 30,
    "cache of tokens": 30,
    "checkpoint": 12,
    "checkpoint in shards": 8,
    "preset": 6,
    "tokenizer of a preset": 10,
    "model.keras": 4,
}
SECONDS = 20  # Before a reading counts as hung.
MEMORY = 6 * 2**30  # Bytes of addresses that a reading may add.
_watch = {"root": None, "seen": [], "hooked": False}


# What is done to files.


def values():
    """JSON values, of any type and depth."""
    leaves = (
        st.sampled_from(NASTY)
        | st.integers(-(2**70), 2**70)
        | st.integers(-2, 9)
        | st.floats()
        | st.text(max_size=6)
    )
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        ),
        max_leaves=4,
    )


VALUES = values()


def places(value):
    """All (container, key) within a JSON value."""
    found, waiting = [], [value]
    while waiting:
        one = waiting.pop()
        pairs = one.items() if isinstance(one, dict) else enumerate(one)
        for key, inner in pairs:
            found.append((one, key))
            if isinstance(inner, (dict, list)):
                waiting.append(inner)
    return found


def damage_json(draw, data, donors):
    """Replaces, removes, renames or moves a value; or breaks the grammar."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return damage_bytes(draw, data, donors)
    kind = draw(st.integers(0, 9))
    where = places(content) if isinstance(content, (dict, list)) else []
    if kind == 0 or not where:
        content = draw(VALUES)
    elif kind == 1:
        depth = draw(st.sampled_from([50, 500, 3000, 100_000]))
        opened, closed = draw(st.sampled_from([("[", "]"), ('{"a":', "}")]))
        deep = opened * depth + "0" + closed * depth
        holder, key = draw(st.sampled_from(where))
        holder[key] = "DEEP"
        return json.dumps(content).replace('"DEEP"', deep, 1).encode()
    else:
        holder, key = draw(st.sampled_from(where))
        if kind == 2:
            del holder[key]
        elif kind == 3:
            other, name = draw(st.sampled_from(where))
            with contextlib.suppress(KeyError, IndexError):
                holder[key] = copy.deepcopy(other[name])
        elif kind == 4 and isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = holder.pop(key)
        elif kind == 5 and isinstance(holder, dict):
            # A name twice: the last one counts.
            text = json.dumps(content)
            more = json.dumps({key: draw(VALUES)})[1:]
            return (text[:-1] + ", " + more).encode()
        else:
            holder[key] = draw(VALUES)
    return json.dumps(content).encode()


def damage_bytes(draw, data, donors):
    """Flips, cuts, removes, repeats, inserts or splices bytes."""
    kind = draw(st.integers(0, 7))
    begin = draw(st.integers(0, max(len(data) - 1, 0)))
    end = min(begin + draw(st.integers(1, 64)), len(data))
    if kind <= 2 and data:
        new = draw(st.binary(min_size=1, max_size=4))
        return data[:begin] + new + data[begin + len(new) :]
    if kind == 3:
        return data[:begin]
    if kind == 4:
        return data[:begin] + data[end:]
    if kind == 5:
        return data[:end] + data[begin:end] * draw(st.integers(1, 9))
    if kind == 6:
        return data[:begin] + draw(st.binary(max_size=40)) + data[begin:]
    donor = draw(st.sampled_from(donors))
    return donor if draw(st.booleans()) else data[:begin] + donor[begin:]


def damage_lines(draw, data, donors):
    """Of a file of JSON lines: one of them, or their order."""
    lines = data.splitlines(True) or [b""]
    i = draw(st.integers(0, len(lines) - 1))
    kind = draw(st.integers(0, 5))
    if kind == 0:
        del lines[i]
    elif kind == 1:
        lines.insert(draw(st.integers(0, len(lines))), lines[i])
    else:
        lines[i] = damage_json(draw, lines[i], donors) + b"\n"
    return b"".join(lines)


def damage_tensors(draw, data, donors):
    """A safetensors header, its length put right."""
    (size,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    header = damage_json(draw, data[8 : 8 + size], donors)
    size = len(header) if draw(st.integers(0, 9)) else 2**62
    return struct.pack("<Q", size) + header + data[8 + size :]


def damage_array(draw, data, donors):
    """The header of an array of numpy."""
    (size,) = struct.unpack("<H", data[8:10].ljust(2, b"\0"))
    header = draw(
        st.sampled_from(
            [
                "{'descr': '|O', 'fortran_order': False, 'shape': (3,)}",
                "{'descr': '|u1', 'fortran_order': False, 'shape': (2**60,)}",
                "{'descr': '<u2', 'fortran_order': 1, 'shape': (-1,)}",
                "{'descr': '<u4', 'fortran_order': False, 'shape': "
                f"({2**62}, {2**62})}}",
                "{'descr': [('a', '|u1')], 'fortran_order': 0, 'shape': ()}",
                "__import__('os').mkdir('stolen')",
                "(" * 3000 + ")" * 3000,
                "{" * 200,
                "",
            ]
        )
    )
    header = header.ljust(size - 1)[: 2**16 - 2].encode() + b"\n"
    return (
        data[:8] + struct.pack("<H", len(header)) + header + data[10 + size :]
    )


def damage_archive(draw, data, donors):
    """A member of a zip file, its checksum put right; or its name."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = draw(st.sampled_from(sorted(members)))
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError):
        return damage_bytes(draw, data, donors)
    if draw(st.integers(0, 4)):
        members[name] = damage(draw, name, members[name], donors)
    else:
        new = st.sampled_from(["../../stolen", "/tmp/stolen", "a/../../x", "x"])
        members[draw(new)] = members.pop(name)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


DAMAGES = {
    ".json": damage_json,
    ".jsonl": damage_lines,
    ".safetensors": damage_tensors,
    ".npy": damage_array,
    ".keras": damage_archive,
    ".npz": damage_archive,
}


def damage(draw, name, data, donors):
    """One piece of damage to a file, by its kind or to its bytes."""
    known = DAMAGES.get(Path(name).suffix, damage_bytes)
    blind = draw(st.integers(0, 3)) == 0
    return (damage_bytes if blind else known)(draw, data, donors)


@st.composite
def damaged(draw, files, donors=()):
    """Files, by name: bytes, None if not there, or a `Path` to link to.

    Args:
        files: dictionary from names to bytes, as a reader likes them.
        donors: list of bytes that may be put in their place.
    """
    files = dict(files)
    donors = [*files.values(), *donors]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(files)))
        if not isinstance(files[name], bytes):
            continue
        kind = draw(st.integers(0, 80))
        if kind == 0:
            files[name] = None
        elif kind == 1:
            target = st.sampled_from(["/etc/passwd", "/dev/null", "..", name])
            files[name] = Path(draw(target))
        else:
            files[name] = damage(draw, name, files[name], donors)
    return files


# Watching a reading.


def _outside(path, follow, directory=-1):
    if isinstance(path, int):
        return False
    path = os.fsdecode(path)
    if directory != -1:
        path = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)
    folder, name = os.path.split(os.path.abspath(path))
    # What renames and removes does so to a link, not to what it leads to.
    path = os.path.join(os.path.realpath(folder), name)
    path = os.path.realpath(path) if follow else path
    return not path.startswith((_watch["root"], "/dev/null", "/proc/self"))


def _importing():
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _audit(event, arguments):
    if _watch["root"] is None:
        return
    bad = event in FORBIDDEN
    if event == "open":
        path, _, flags = arguments
        writes = flags and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        bad = writes and _outside(path, True)
    elif event in WRITING:
        place, at = WRITING[event]
        directory = -1 if at is None else arguments[at]
        bad = _outside(arguments[place], False, directory)
    # Modules that are imported late are code, of ours.
    if bad and not _importing():
        _watch["seen"].append(f"{event} {arguments!r}"[:200])


@contextlib.contextmanager
def watching(root):
    """The list of what is done within it that no reader may do."""
    if not _watch["hooked"]:
        # Of a process, for good.
        sys.addaudithook(_audit)
    _watch.update(root=os.path.realpath(root), seen=[], hooked=True)
    try:
        yield _watch["seen"]
    finally:
        _watch["root"] = None


def write(folder, files):
    """Makes a directory of what `damaged` drew."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            path.symlink_to(content)
        elif content is not None:
            path.write_bytes(content)


def pickled(path):
    """A pickle that makes a directory when it is loaded."""
    # Of numpy's own format too: an array of objects.
    reduce = b"cos\nmkdir\n(V" + str(path).encode() + b"\ntR."
    file = io.BytesIO()
    np.save(file, np.array([None, 1]), allow_pickle=True)
    array = file.getvalue()
    array = array[: array.index(b"\n") + 1] + reduce
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("step.npy", array)
        members.writestr("archive/data.pkl", reduce)
    return [reduce, array, archive.getvalue()]


def attempt(root, files, read, allowed):
    """Reads what is damaged. Returns a word for what came of it.

    Args:
        root: directory, all of which may be written.
        files: of `damaged`.
        read: function of a directory.
        allowed: exceptions that its documentation names.

    Returns:
        Tuple: `"read"` or the name of an exception, and what should not have
        been: None, or a sentence.
    """
    folder = root / "given"
    write(folder, files)
    outcome, wrong = "read", None
    with watching(root) as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                read(folder)
            except allowed as error:
                outcome = type(error).__name__
                if not str(error):
                    wrong = f"{outcome} without a word"
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                outcome = type(error).__name__
                place = traceback.extract_tb(error.__traceback__)
                ours = [p for p in place if "keras_stable" in p.filename]
                at = [
                    f"{Path(p.filename).name}:{p.lineno}"
                    for p in (ours[-1:] + place[-1:])
                ]
                wrong = f"{outcome} at {' '.join(at)}: {error!r}"[:400]
    if seen:
        wrong = f"forbidden: {seen[0]}"
    if (root / "stolen").exists():
        (root / "stolen").rmdir()
        wrong = "a pickle was loaded"
    return outcome, wrong


# The readers: what they are given, and what is made of it.


def readers(ks):
    """Dictionary by the names in `SHARES`: `(make, read, allowed)`.

    `make` fills a directory with sound files, `read` is given one with others,
    `allowed` are the exceptions that the reader's documentation names.
    """
    import keras

    tokenizer = ks.BPETokenizer.train(["banana bandana"] * 9, 262)
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8}
    sizes |= {"max_sequence_length": 16}

    def model(variant="qwen3", tokenizer=tokenizer):
        backbone = ks.StableBackbone(262, variant=variant, **sizes)
        preprocessor = ks.StableCausalLMPreprocessor(tokenizer, 16)
        return ks.StableCausalLM(backbone, preprocessor)

    def one_file(folder):
        model().to_transformers(folder)

    def shards(folder):
        model("gpt2").to_transformers(folder, max_shard_size=6000)

    def tokenizer_file(folder):
        folder.mkdir()
        tokenizer.to_file(folder / "tokenizer.json")

    def words_file(folder):
        import tokenizers

        folder.mkdir()
        unigram = tokenizers.models.Unigram([("a", -1.0), ("</s>", -2.0)], 0)
        made = tokenizers.Tokenizer(unigram)
        made.add_special_tokens(["</s>"])
        made.normalizer = tokenizers.normalizers.NFKC()
        made.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
        made.save(str(folder / "tokenizer.json"))

    def speak(read):
        def consume(folder):
            made = read(folder)
            made.detokenize(made.tokenize("a banana"))
            return made

        return consume

    def proto(folder):
        import sentencepiece

        folder.mkdir()
        file = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a banana and a bandana", "ananas"] * 9),
            model_writer=file,
            vocab_size=24,
            minloglevel=2,
            hard_vocab_limit=False,
        )
        (folder / "m.model").write_bytes(file.getvalue())

    def run(folder):
        directory = ks.RunDirectory(folder, {"variant": "qk_norm", "seed": 1})
        directory.update(losses=[1.0, float("nan")], status="finished")

    def trained(folder):
        # With the full table in every step, attention's too.
        x = keras.Input((4, 2))
        y = keras.layers.MultiHeadAttention(2, 2)(x, x)
        model = keras.Model(x, keras.layers.Dense(1)(y))
        model.compile("adam", "mse")
        monitor = ks.StabilityMonitor(folder, every=1, verbose=0)
        data, target = np.ones((60, 4, 2)), np.ones((60, 4, 1))
        model.fit(data, target, 2, verbose=0, callbacks=[monitor])

    def health(folder):
        found = ks.read_health(folder)
        for name in ("loss", "gradient_norm", "epoch"):
            found.series(name)
        for kind in ("tensors", "variables", "heads"):
            for name in list(found.layout.get(kind, []))[:1]:
                columns = found.layout.get(f"{kind.rstrip('s')}_statistics")
                found.table(kind, name, (columns or ["rms"])[0])

    def text(folder):
        folder.mkdir()
        (folder / "a.txt").write_text("To be, or not to be.\n" * 9)
        (folder / "b.txt").write_text("é 漢字", "utf-8")
        (folder / "c").mkdir()
        (folder / "c/d.py").write_text("print(1)")

    def corpus(folder):
        for source in (folder, folder / "*.txt", folder / "a.txt"):
            documents = ks.load_corpus(source)
            ks.load_tokenizer("character", documents)

    source = Path(tempfile.mkdtemp(), "text")
    source.write_text("To be, or not to be.")
    expected = ks.tokenize_corpus(source, ks.ByteTokenizer())

    def cache(folder):
        ks.tokenize_corpus(source, ks.ByteTokenizer(), cache=folder)

    def cached(folder):
        found = ks.tokenize_corpus(source, ks.ByteTokenizer(), cache=folder)
        for side in ("training", "validation"):
            same = np.array_equal(getattr(found, side), getattr(expected, side))
            assert same, "other tokens"

    def variant(folder):
        folder.mkdir()
        entropy = ks.Entropy(weight=1e-2, floor=0.1)
        clip = ks.Clip(zeta=1.03, gamma=-0.03)
        made = ks.get_variant("sigma_reparam").replace(
            entropy=entropy,
            clip=clip,
            gain=ks.Learned(0.1),
            sliding_window=(4, None),
        )
        (folder / "variant.json").write_text(json.dumps(made.to_dict()))

    def read_variant(folder):
        try:
            content = json.loads((folder / "variant.json").read_text())
        except (OSError, ValueError, RecursionError):
            return
        made = ks.Variant.from_dict(content)
        assert ks.Variant.from_dict(made.to_dict()) == made

    def preset(folder):
        model().save_to_preset(str(folder))

    def saved(folder):
        folder.mkdir()
        model().save(folder / "m.keras")

    small = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    small.compile("sgd", "mse")
    ones = np.ones((8, 1))

    def resumed(folder):
        monitor = ks.StabilityMonitor(folder, every=None, verbose=0)
        small.fit(ones, ones, batch_size=1, verbose=0, callbacks=[monitor])

    def monitored(folder):
        for _ in range(20):
            resumed(folder)

    readable = (ValueError, OSError)
    lm, load = ks.StableCausalLM, ks.load_tokenizer
    return {
        "checkpoint": (one_file, lm.from_transformers, readable),
        "checkpoint in shards": (shards, lm.from_transformers, readable),
        "preset": (preset, lambda f: lm.from_preset(str(f)), readable),
        "tokenizer.json": (
            tokenizer_file,
            speak(lambda folder: load(folder / "tokenizer.json")),
            readable,
        ),
        "tokenizer.json, unigram": (
            words_file,
            speak(lambda folder: load(folder / "tokenizer.json")),
            readable,
        ),
        "tokenizer of a preset": (preset, speak(load), readable),
        "SentencePiece model": (
            proto,
            speak(lambda folder: load(folder / "m.model")),
            readable,
        ),
        "run.json": (run, ks.read_run, readable),
        "health.jsonl": (trained, health, readable),
        "run that is continued": (monitored, resumed, readable),
        "corpus": (text, corpus, readable),
        "cache of tokens": (cache, cached, readable),
        "variant": (variant, read_variant, (ValueError, TypeError)),
        # Keras's own reader, of our classes: it documents no exceptions.
        "model.keras": (
            saved,
            lambda folder: keras.saving.load_model(folder / "m.keras"),
            Exception,
        ),
    }


def sound(make, folder):
    """The files that a reader likes, by name."""
    make(folder)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _hung(signal, frame):
    raise RuntimeError(f"no end in {SECONDS} seconds")


def fuzz(name, count, seed):
    """Gives one reader so many inputs. Returns what came of them."""
    import keras_stable as ks

    faulthandler.enable()
    root = Path(tempfile.mkdtemp()).resolve()
    # What a reader unpacks may be unpacked here.
    tempfile.tempdir = str(root)
    sys.dont_write_bytecode = True
    make, read, allowed = readers(ks)[name]
    files = sound(make, root / "sound")
    read(root / "sound")
    # A request for petabytes fails, and does not take the machine with it.
    used = int(Path("/proc/self/statm").read_text().split()[0])
    limit = used * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, _hung)
    outcomes, unexpected = collections.Counter(), {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(damaged(files, pickled(root / "stolen")))
    def give(inputs):
        signal.alarm(SECONDS)
        outcome, wrong = attempt(root, inputs, read, allowed)
        signal.alarm(0)
        outcomes[outcome] += 1
        if wrong is not None:
            found = unexpected.setdefault(wrong.partition(": ")[0], [0, wrong])
            found[0] += 1

    begin = time.perf_counter()
    give()
    shutil.rmtree(root)
    return {
        "inputs": sum(outcomes.values()),
        "outcomes": dict(outcomes.most_common()),
        "unexpected": [
            {"count": count, "what": what}
            for count, what in unexpected.values()
        ],
        "seconds": round(time.perf_counter() - begin, 1),
    }


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--inputs", type=int, default=107_000, help="in all (107000)")
    add("--seed", type=int, default=1, help="(1)")
    add("--readers", nargs="+", help="others are kept as they are in --out")
    add("--only", help="one reader, in this process")
    add("--backend", default=os.environ.get("KERAS_BACKEND", "jax"))
    add("--out", help="result file")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    os.environ["KERAS_BACKEND"] = args.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras_stable as ks

    if args.only:
        found = fuzz(args.only, args.inputs, args.seed)
        print(json.dumps(found))
        return True
    environment, found = ks.environment(), {}
    if args.readers:
        found = json.loads(Path(args.out).read_text())["readers"]
    for name in args.readers or SHARES:
        count = -(-args.inputs * SHARES[name] // sum(SHARES.values()))
        command = [sys.executable, __file__, "--only", name]
        command += ["--inputs", str(count), "--seed", str(args.seed)]
        done = subprocess.run(
            [*command, "--backend", args.backend],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        try:
            result = json.loads(done.stdout.splitlines()[-1])
        except (ValueError, IndexError):
            what = f"the process ended with {done.returncode}: {done.stderr}"
            crash = {"count": 1, "what": what[:40] + what[-2000:]}
            result = {"inputs": 0, "outcomes": {}, "unexpected": [crash]}
            result["seconds"] = None
        found[name] = {**result, "git_commit": environment["git_commit"]}
        words = ", ".join(f"{k} {v}" for k, v in result["outcomes"].items())
        print(f"{name:24}{result['inputs']:7}  {words}", flush=True)
        for line in result["unexpected"]:
            times = f"    unexpected, {line['count']} times"
            print(f"{times}: {line['what']}", flush=True)
    total = sum(result["inputs"] for result in found.values())
    wrong = sum(len(result["unexpected"]) for result in found.values())
    print(f"{total} inputs, {wrong} kinds of unexpected ends")
    if args.out:
        content = {
            "schema": 1,
            "config": vars(args),
            **environment,
            "hypothesis": hypothesis.__version__,
            "inputs": total,
            "readers": {n: found[n] for n in SHARES if n in found},
        }
        Path(args.out).write_text(json.dumps(content, indent=1) + "\n")
    return not wrong


if __name__ == "__main__":
    sys.exit(not main())
