"""Damaged and hostile files by the hundred: seeded mutations of valid ones, and what a reader may do with them.

A reader is a build and a read function. `build()` gives (files, targets): what lies in the folder, {name: bytes}, and
the files of which one is mutated in each case, [(name, bytes, mutation)]. `read(folder, name)` reads the mutated file
through the entry point that the scripts use, and uses what it has read.

Allowed are a correct load, and a ValueError or OSError of one line that names the file. Nothing else is: no other
exception, no more than SECONDS of the processor's time, no more than MEMORY bytes beyond what the process has.
"""
import contextlib
import copy
import json
import random
import resource
import signal
import struct
import traceback
import warnings

SECONDS, MEMORY = 5, 640 << 20
NUMBERS = [0, 1, 2, 3, 7, 8, 31, 127, 128, 255, 256, 1 << 15, (1 << 16) - 1, 10**6, 10**9, (1 << 31) - 1, 1 << 31,
           (1 << 32) - 1, 1 << 32, 1 << 40, 10**15, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
TEXTS = ["", "x", " ", "\\u0000", "\\ud800", "a\\nb", "../../etc/passwd", "/etc/passwd", "4", "NaN", "(a+)+$", "(", "x" * 100000,
         "\\u2581", "Sequence", "ByteLevel", "Regex", "\\\\boxed{", "#### ", "<<" * 2000, "#### " + "1" * 5000, "model.safetensors"]
LITERALS = ["null", "true", "false", "0.5", "-0.0", "-1", "1e999", "-1e999", "1e-320", "NaN", "Infinity", "9" * 400,
            "-" + "9" * 400, "9" * 5000, "[]", "{}", "[[]]", "[1,2]", '["a"]', '{"a":1}', "[" + "0," * 10000 + "0]",
            "[" * 950 + "]" * 950, "[" * 100000 + "]" * 100000, '{"a":' * 950 + "1" + "}" * 950,
            *map(str, NUMBERS), *(f'"{text}"' for text in TEXTS)]


# ---- bytes ----------------------------------------------------------------------------------------------------------

def place(raw, rng):
    """A position, early ones more often: there are the headers."""
    return int(len(raw) * rng.random() ** rng.choice((1, 2, 4)))


def piece(raw, rng):
    """A slice, mostly short."""
    start = place(raw, rng)
    return slice(start, start + rng.choice((1, 2, 4, 8, 9, 30, rng.randrange(1, len(raw) + 2))))


def overwrite_number(raw, rng):
    """A number of 1 to 8 bytes, where there was a small one if such a place is found: a size, a count, an offset."""
    size = rng.choice((1, 2, 4, 8, 8))
    for _ in range(30):
        at = place(raw, rng)
        if int.from_bytes(raw[at:at + size], "little") < 4096:
            break
    raw[at:at + size] = (rng.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")


def flip(raw, rng):
    if raw:
        raw[place(raw, rng)] ^= 1 << rng.randrange(8)


def truncate(raw, rng):
    del raw[place(raw, rng):]


def remove(raw, rng):
    del raw[piece(raw, rng)]


def insert(raw, rng):
    at = place(raw, rng)
    raw[at:at] = rng.randbytes(rng.choice((1, 2, 8, 100)))


def duplicate(raw, rng):
    copied, at = raw[piece(raw, rng)], place(raw, rng)
    raw[at:at + rng.choice((0, len(copied)))] = copied


OPERATIONS = (overwrite_number, overwrite_number, flip, truncate, remove, insert, duplicate)


def mutate_bytes(raw, rng):
    """Some of the operations, one after the other."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        rng.choice(OPERATIONS)(raw, rng)
    return bytes(raw)


# ---- JSON -----------------------------------------------------------------------------------------------------------

MARK, AGAIN = "@mark@", "@again@"  # where a literal goes, that JSON can spell and Python cannot; a key that comes twice


def nodes(tree, rng):
    """(container, key) on a random way down the tree, all but the first where there are more."""
    way = []
    while isinstance(tree, (dict, list)) and tree:
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        way.append((tree, key))
        tree = tree[key]
    return way[1:] or way


def mutate_json(text, rng):
    """The JSON text with values replaced by what should not be there, removed, wrapped, doubled, copied, off by one."""
    tree = {"root": json.loads(text)}
    for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
        container, key = rng.choice(nodes(tree, rng))
        value, kind = container[key], rng.randrange(10)
        if kind < 4 or container is tree:
            container[key] = MARK
        elif kind == 4:
            del container[key]
        elif kind == 5:
            container[key] = [value]
        elif kind == 6 and isinstance(container, dict):
            container[AGAIN + key] = MARK
        elif kind == 7 and isinstance(container, dict):
            container[rng.choice(("x", "", "\ud800", "a\nb", *container))] = container.pop(key)
        elif kind == 8 and type(value) in (int, float):
            container[key] = value + rng.choice((1, -1, 0.5))
        else:
            other, elsewhere = rng.choice(nodes(tree, rng))
            other[elsewhere] = copy.deepcopy(value)
    text = json.dumps(tree["root"]).replace(f'"{AGAIN}', '"')
    return text.replace(f'"{MARK}"', rng.choice(LITERALS)).encode()


def mutate_lines(raw, rng):
    """One line of a .jsonl file mutated as JSON."""
    lines = raw.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(lines[at], rng)
    return b"\n".join(lines)


def mutate_header(raw, rng, part=mutate_json):
    """The header of a safetensors file mutated by `part`, its length mostly set right."""
    size = struct.unpack("<Q", raw[:8])[0]
    header = part(raw[8:8 + size], rng)
    return struct.pack("<Q", rng.choice((len(header),) * 9 + (size,))) + header + raw[8 + size:]


def mutate_metadata(key):
    """A mutation of the JSON text that a safetensors file has as metadata under `key`."""
    def part(header, rng):
        fields = json.loads(header)
        fields["__metadata__"][key] = mutate_json(fields["__metadata__"][key], rng).decode()
        return json.dumps(fields).encode()
    return lambda raw, rng: mutate_header(raw, rng, part)


def either(*mutations):
    """One of several mutations."""
    return lambda raw, rng: rng.choice(mutations)(raw, rng)


# ---- the run --------------------------------------------------------------------------------------------------------

class Hang(BaseException):
    """A case took longer than SECONDS."""


@contextlib.contextmanager
def bounds():
    """Bounded memory, and an alarm by the processor's time that raises; what was set is set again afterwards."""
    def hang(*_):
        raise Hang(f"more than {SECONDS} seconds")

    pages = int(open("/proc/self/statm").read().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGVTALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(read, folder, name):
    """"loaded", "refused", or what is unclean."""
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            read(folder, name)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        return "loaded"
    except (ValueError, OSError) as error:
        message = str(error)
        if "\n" not in message and len(message) < 2000 and any(part in message for part in (str(folder), *name.split("/"))):
            return "refused"
        return f"says {type(error).__name__}: {message[:300]!r}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]!r} at {last.filename.rpartition('/')[2]}:{last.lineno}"


def fuzz(label, reader, seeds, folder, most=5):
    """Read a mutated file per seed. Returns the counts of outcomes; AssertionError for unclean ones, with their seeds."""
    build, read = reader
    files, targets = build()
    files = {**files, **{name: content for name, content, _ in targets}}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name, _, _ in targets:
        read(folder, name)  # the file as it is loads
    counts, unclean = {"loaded": 0, "refused": 0}, []
    with bounds():
        for seed in seeds:
            rng = random.Random(f"{label} {seed}")
            name, content, mutation = rng.choice(targets)
            (folder / name).unlink()  # a new file: the old one may still be mapped
            (folder / name).write_bytes(mutation(content, rng))
            found = outcome(read, folder, name)
            (folder / name).unlink()
            (folder / name).write_bytes(content)
            if found in counts:
                counts[found] += 1
            elif len(unclean) < most:
                unclean.append(f"{label}, seed {seed} ({name}): {found}")
    assert not unclean, "\n".join(["unclean:", *unclean])
    return counts
