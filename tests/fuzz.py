"""Hostile files by the thousand: seeded mutations of valid ones, and what a reader may do with them.

A reader is a build and a read function. `build()` gives (files, targets): what lies in the folder, {name: bytes}, and
the files of which one is mutated in each case, [(name, bytes, mutation)]. `read(folder, name)` reads the mutated file
through the entry point that the scripts use, and uses what it has read.

Allowed are a correct load, and a ValueError or OSError of one line that names the file. Nothing else is: no other
exception, no more than SECONDS, no more than MEMORY bytes beyond what the process has.
"""
import contextlib
import json
import os
import random
import re
import resource
import signal
import struct
import threading
import time
import traceback
import warnings

SECONDS, MEMORY = 3, 640 << 20
NUMBERS = [0, 1, 2, 3, 7, 8, 31, 127, 128, 255, 256, 1 << 15, (1 << 16) - 1, 10**6, 10**9, (1 << 31) - 1, 1 << 31,
           (1 << 32) - 1, 1 << 32, 1 << 40, 10**15, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
TEXTS = ["", "x", " ", "\\u0000", "\\ud800", "a\\nb", "../../etc/passwd", "/etc/passwd", "4", "NaN", "(a+)+$", "(", "x" * 100000,
         "\\u2581", "Sequence", "ByteLevel", "Regex", "\\\\boxed{", "#### ", "<<" * 2000, "#### " + "1" * 5000, "model.safetensors"]
LITERALS = ["null", "true", "false", "0.5", "-0.0", "-1", "1e999", "-1e999", "1e-320", "NaN", "Infinity", "9" * 400,
            "-" + "9" * 400, "9" * 5000, "[]", "{}", "[[]]", "[1,2]", '["a"]', '{"a":1}', "[" + "0," * 10000 + "0]",
            *map(str, NUMBERS), *(f'"{text}"' for text in TEXTS)]


# ---- bytes ----------------------------------------------------------------------------------------------------------

def place(raw, rng):
    """A position, early ones more often: there are the headers."""
    return int(len(raw) * rng.random() ** rng.choice((1, 2, 4)))


def cut(raw, rng):
    """A slice, mostly short."""
    start = place(raw, rng)
    return slice(start, start + rng.choice((1, 2, 4, 8, 9, 30, rng.randrange(1, len(raw) + 2))))


def overwrite_number(raw, rng):
    """A number of 1 to 8 bytes, where there was a small one if such a place is found: a size, a count, an offset."""
    size, code = rng.choice(((1, "<B"), (2, "<H"), (4, "<I"), (8, "<Q"), (8, "<Q")))
    for _ in range(30):
        at = place(raw, rng)
        if int.from_bytes(raw[at:at + size], "little") < 4096:
            break
    raw[at:at + size] = struct.pack(code, rng.choice(NUMBERS) % (1 << 8 * size))


def overwrite_digits(raw, rng):
    """A number that is spelled out."""
    found = list(re.finditer(rb"\d+", raw))
    if found:
        match = rng.choice(found)
        raw[match.start():match.end()] = rng.choice((b"-1", b"1e9", b"9" * 30, str(rng.choice(NUMBERS)).encode()))


def flip(raw, rng):
    if raw:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


def overwrite(raw, rng):
    if raw:
        raw[place(raw, rng)] = rng.choice((0, 1, 32, 34, 44, 48, 57, 91, 93, 123, 125, 127, 128, 255, rng.randrange(256)))


def truncate(raw, rng):
    del raw[place(raw, rng):]


def remove(raw, rng):
    del raw[cut(raw, rng)]


def insert(raw, rng):
    at = place(raw, rng)
    raw[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 8, 100))))


def duplicate(raw, rng):
    piece, at = raw[cut(raw, rng)], place(raw, rng)
    raw[at:at] = piece


def splice(raw, rng):
    piece, at = raw[cut(raw, rng)], place(raw, rng)
    raw[at:at + len(piece)] = piece


def swap(raw, rng):
    one, two = sorted((place(raw, rng), place(raw, rng)))
    raw[one:] = raw[two:] + raw[one:two]


OPERATIONS = (overwrite_number, overwrite_number, overwrite_digits, flip, overwrite, truncate, remove, insert, duplicate,
              splice, swap)


def mutate_bytes(raw, rng):
    """Some of the operations, one after the other."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        rng.choice(OPERATIONS)(raw, rng)
    return bytes(raw)


# ---- JSON -----------------------------------------------------------------------------------------------------------

def literal(rng):
    """The text of a value that should not be there."""
    if rng.random() < 0.15:
        depth = rng.choice((3, 100, rng.randrange(900, 1000), 100000))
        return rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
    return rng.choice(LITERALS)


def nodes(tree, rng):
    """(container, key) on a random way down the tree."""
    way = []
    while isinstance(tree, (dict, list)) and tree:
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        way.append((tree, key))
        tree = tree[key]
    return way


def mutate_json(text, rng):
    """The JSON text with values replaced, removed, renamed, doubled, swapped or wrapped."""
    tree, literals = {"root": json.loads(text)}, []

    def hostile():
        literals.append(literal(rng))
        return f"@literal {len(literals) - 1}@"

    for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
        way = nodes(tree, rng)
        container, key = rng.choice(way[1:] if len(way) > 1 and rng.random() < 0.97 else way)
        kind = rng.randrange(10)
        value = container[key]
        if kind < 4 or container is tree:
            container[key] = hostile()
        elif kind == 4:
            del container[key]
        elif kind == 5 and isinstance(container, dict):
            name = rng.choice(("x", "", "__metadata__", hostile(), rng.choice(list(container))))
            container[name] = container.pop(key)
        elif kind == 6 and isinstance(container, dict):
            container[f"@again@{key}"] = rng.choice((value, hostile()))
        elif kind == 6:
            container[key:key] = [value] * rng.choice((1, 3, 50))
        elif kind == 7:
            container[key] = rng.choice(([value], {"a": value}, str(value)[:50]))
        elif kind == 8 and type(value) in (int, float):
            container[key] = rng.choice((value + 1, value - 1, -value, value * 10**9, value / 2, float(value)))
        else:
            other, elsewhere = rng.choice(nodes(tree, rng)[1:] or [(container, key)])
            other[elsewhere] = value if isinstance(value, (str, int, float, bool, type(None))) else [key]
    text = json.dumps(tree["root"]).replace('"@again@', '"')
    return re.sub(r'"@literal (\d+)@"(:?)', lambda found: as_key(literals[int(found[1])], found[2]), text).encode("utf-8")


def as_key(text, colon):
    """A literal in the place of a value, or of a key (which must be a text for the rest to be read)."""
    return text if not colon or text.startswith('"') else json.dumps(text) + colon


def either(*mutations):
    """One of several mutations."""
    return lambda raw, rng: rng.choice(mutations)(raw, rng)


def mutate_lines(raw, rng):
    """One line of a .jsonl file mutated as JSON."""
    lines = raw.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(lines[at], rng)
    return b"\n".join(lines)


def mutate_header(raw, rng, part=mutate_json):
    """The header of a safetensors file mutated as JSON, its length mostly set right."""
    size = struct.unpack("<Q", raw[:8])[0]
    header = part(raw[8:8 + size], rng)
    return struct.pack("<Q", rng.choice((len(header),) * 9 + (size,))) + header + raw[8 + size:]


# ---- the run --------------------------------------------------------------------------------------------------------

class Hang(BaseException):
    """A case took longer than SECONDS."""


@contextlib.contextmanager
def bounds():
    """Bounded address space, and an alarm that raises; the limits are put back afterwards."""
    def hang(*_):
        raise Hang(f"more than {SECONDS} seconds")

    pages = int(open("/proc/self/statm").read().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(read, folder, name):
    """"loaded", "refused", or what is unclean."""
    try:
        signal.alarm(SECONDS)
        try:
            read(folder, name)
        finally:
            signal.alarm(0)
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


def watch(current, over):
    """End the process, saying where it stands, if a case hangs in native code, where no alarm is heard."""
    while not over.wait(1):
        case, since = current
        if time.time() - since > 20 * SECONDS:
            os.write(2, f"\n{case}: hangs in native code\n".encode())
            os._exit(1)


def fuzz(label, reader, seeds, folder, most=5):
    """Read a mutated file per seed. Returns the counts of outcomes; AssertionError for unclean ones, with their seeds."""
    build, read = reader
    files, targets = build()
    for name, content in [*files.items(), *((name, content) for name, content, _ in targets)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name, _, _ in targets:
        read(folder, name)  # the file as it is loads
    counts, unclean, current, over = {"loaded": 0, "refused": 0}, [], [label, time.time()], threading.Event()
    threading.Thread(target=watch, args=(current, over), daemon=True).start()
    with contextlib.ExitStack() as stack:
        stack.callback(over.set)
        stack.enter_context(bounds())
        for seed in seeds:
            current[:] = f"{label}, seed {seed}", time.time()
            rng = random.Random(f"{label} {seed}")
            name, content, mutation = rng.choice(targets)
            (folder / name).unlink()  # a new file: the old one may still be mapped
            (folder / name).write_bytes(mutation(content, rng))
            found = outcome(read, folder, name)
            (folder / name).unlink()
            (folder / name).write_bytes(content)
            if found in counts:
                counts[found] += 1
            else:
                unclean.append(f"{label}, seed {seed} ({name}): {found}")
                if len(unclean) == most:
                    break
    assert not unclean, "\n".join(["unclean:", *unclean])
    return counts
