"""A model of the Hugging Face hub, fetched with the standard library: `fetch("HuggingFaceTB/SmolLM2-360M", folder)`.

Only data is fetched: config, tokenizer and safetensors files of one revision, each checked by size and, where the hub
gives one, by its sha256. A download that broke off goes on where it stopped, if the model is still at that revision.
`HF_TOKEN` opens gated models.

    NAME.part         what has come of a file
    revision.part     the revision that is being fetched
    revision.txt      it again, once all is there, and of each file its size, its sha256 if it is small, and its name
"""
import http.client
import io
import ipaddress
import json
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from weights.files import LARGEST_HEADER, LOCK, atomic_write, locked, names_file, sha256
from weights.safetensors import read_safetensors

NAMED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "chat_template.jinja", "model.safetensors.index.json")
BLOCK = 1 << 20
PATIENCE, LEAST = 30, 30_000  # a download of fewer bytes in so many seconds has come to a stop


def is_hub_id(name):
    """Whether `name` looks like owner/model."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not name.endswith(".gguf")


def fetch(name, folder):
    """Bring the files of the model called `name` ("owner/model") into `folder`; returns it.

    Files that are there are not fetched again, unless they are no longer as they came. Raises ConnectionError without a
    connection, for a name the hub does not have, or for a gated model without a token; ValueError for a file that is
    not what the hub says it is.
    """
    folder = Path(folder)

    def wait(who):
        print(f"waiting for {who}, which fetches {name} ...", file=sys.stderr)

    if damaged(folder) != []:
        secret = token()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}{LOCK}"), wait):
            try:
                mend(folder)
                if damaged(folder) is None:  # nobody has fetched it meanwhile
                    fetch_files(name, folder)
            except (ConnectionError, ValueError) as error:  # a server may say again what it was told
                raise type(error)(str(error).replace(secret or "HF_TOKEN", "HF_TOKEN")) from None
    return folder


def damaged(folder):
    """The files that are not as revision.txt says; None where it says nothing: the folder is not complete."""
    record = folder / "revision.txt"
    text = record.read_text(errors="replace") if record.is_file() else ""
    if not re.match(r"[0-9a-f]{40}(\n|$)", text):
        return None
    files = [(folder / name, size, digest) for size, digest, name in re.findall(r"^(\d+) (\S+) ([\w.-]+)$", text, re.M)]
    return [path for path, size, digest in files
            if not path.is_file() or str(path.stat().st_size) != size or digest != "-" and sha256(path) != digest]


def mend(folder):
    """Take out of a complete folder what is damaged, so that it is fetched again."""
    bad = damaged(folder)
    if bad:
        for path in bad:
            print(f"{path} is not as it was fetched: it is fetched again", file=sys.stderr)
            path.unlink(missing_ok=True)
        begin(folder, (folder / "revision.txt").read_text()[:40])


def begin(folder, revision):
    """Note that this revision is being fetched into the folder, which from here on is not complete."""
    (folder / "revision.txt").unlink(missing_ok=True)
    with atomic_write(folder / "revision.part") as file:
        file.write(revision.encode())


def fetch_files(name, folder):
    """Bring all files of the model into the folder, from where an earlier attempt stopped."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not re.match(r"https?://([^/\[\]\s]+|\[[0-9a-fA-F:.]+\](:\d+)?)(/|$)", endpoint):
        raise ValueError(f"HF_ENDPOINT is {endpoint!r}, which is no address: set it as in https://huggingface.co, or "
                         "unset it")
    url, text = f"{endpoint}/api/models/{name}?blobs=true", io.BytesIO()
    with request(url, name) as reply:
        copy(reply, text, url, name, LARGEST_HEADER)
    try:
        listing = json.loads(text.getvalue())
        revision, files = listing["sha"], listing["siblings"]
        single = any(file["rfilename"] == "model.safetensors" for file in files)  # then no shard is read
        wanted = [file for file in files if file["rfilename"] in NAMED or is_weights(file["rfilename"], single)]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConnectionError(f"{name}: the hub's answer is not a list of files; try again later") from None
    if not any(is_weights(file["rfilename"]) for file in wanted):
        raise ValueError(f"{name}: this model has no safetensors files, and nothing else is loaded: pickled weights "
                         "can run code")
    if not re.fullmatch("[0-9a-f]{40}", str(revision)):
        raise ConnectionError(f"{name}: the hub gave no revision; try again later")
    lacking = {"config.json", "tokenizer.json"} - {file["rfilename"] for file in wanted}
    if lacking:
        raise ValueError(f"{name}: this model has no {' and no '.join(sorted(lacking))}, without which it is not "
                         "loaded: take another")
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "revision.part"
    if not begun.is_file() or begun.read_text(errors="replace") != revision:  # what is there is of another, or unknown
        for path in folder.iterdir():
            if path.name.removesuffix(".part") in NAMED or is_weights(path.name.removesuffix(".part")):
                path.unlink()
        begin(folder, revision)
    record = [revision]
    for file in wanted:
        path, size, lfs = folder / file["rfilename"], file.get("size"), file.get("lfs")
        download(f"{endpoint}/{name}/resolve/{revision}/{path.name}", path, name, size if type(size) is int else None,
                 lfs.get("sha256") if isinstance(lfs, dict) else None)
        record.append(f"{path.stat().st_size} {'-' if is_weights(path.name) else sha256(path)} {path.name}")
    with atomic_write(folder / "revision.txt") as file:
        file.write("\n".join(record).encode())
    begun.unlink()


def is_weights(filename, single=False):
    """model.safetensors, or (not beside a single file) a shard of it; in the top folder only."""
    return re.fullmatch(r"model" + r"(-\d{5}-of-\d{5})?" * (not single) + r"\.safetensors", filename) is not None


def token():
    """The token in HF_TOKEN, or None. ValueError, which does not hold it, for what cannot be one."""
    text = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch("[!-~]*", text):
        raise ValueError("HF_TOKEN holds spaces or other characters that no token has: set it again")
    return text or None


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows the hub to its storage: over https, or to this machine; and to another place of its own, where a model
    has been renamed, with the token, which nobody else is to see."""

    def redirect_request(self, request, reply, code, message, headers, url):
        where = urllib.parse.urlsplit(url)
        home = where[:2] == urllib.parse.urlsplit(request.full_url)[:2]  # the same scheme, host and port
        if not home and where.scheme != "https" and not (where.scheme == "http" and is_this_machine(where.hostname)):
            message = f"sent on to {url}, which is not https"
            raise urllib.error.HTTPError(request.full_url, code, message, headers, reply)
        follow = super().redirect_request(request, reply, code, message, headers, url)
        if home and request.has_header("Authorization"):
            follow.add_unredirected_header("Authorization", request.get_header("Authorization"))
        return follow


def is_this_machine(host):
    """Whether a host's name is one of this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def request(url, name, start=0):
    """An open reply to a GET of `url` from byte `start` on. ConnectionError in words for what goes wrong."""
    headers = {"User-Agent": "lora-reference", **({"Range": f"bytes={start}-"} if start else {})}
    asked, secret = urllib.request.Request(url, headers=headers), token()
    if secret:
        # Not passed on when the hub sends us to its storage: see Redirects.
        asked.add_unredirected_header("Authorization", f"Bearer {secret}")
    try:
        return in_time(2 * PATIENCE, lambda: urllib.request.build_opener(Redirects).open(asked, timeout=PATIENCE))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise ConnectionError(f"{name}: no folder here, and the hub refuses access ({error.code}): gated, private "
                                  "or misspelt; accept its terms on its page and set HF_TOKEN to a token that may read "
                                  "it") from None
        if error.code == 404:
            raise ConnectionError(f"{name}: no folder here, and the hub has no such model or file ({url})") from None
        raise ConnectionError(f"{url}: {error}; try again later") from None
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{url}: no connection ({error}); with a copy of the model, pass --model FOLDER"
                              ) from None


def in_time(seconds, function):
    """What a function returns or raises; TimeoutError after so many seconds. A socket's own timeout is for each piece
    that comes, be it a byte."""
    done = []

    def call():
        try:
            done.append((function(), None))
        except Exception as error:
            done.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise TimeoutError(f"no answer in {seconds} seconds")
    result, error = done[0]
    if error:
        raise error
    return result


def download(url, path, name, size, expected):
    """Fetch one file to `path`, from where an earlier attempt stopped; checked, then renamed: whole or not there."""
    if path.is_file():
        return
    part = path.with_name(path.name + ".part")
    start = part.stat().st_size if part.is_file() else 0
    if size is None or start >= size:
        start = 0
    most = size if size is not None else 1 << 50 if is_weights(path.name) else LARGEST_HEADER
    with request(url, name, start) as reply, names_file(part):
        with open(part, "ab" if reply.status == 206 else "wb") as target:
            copy(reply, target, url, path.name, most, size)
    check(part, path, size, expected)
    os.replace(part, path)


def copy(reply, target, url, label, most, size=None):
    """Copy a reply of at most `most` bytes to a file, with a line of progress on a terminal's stderr. ConnectionError
    where it breaks off, or hardly comes."""
    done = counted = target.tell()
    shown = since = time.monotonic()
    while True:
        try:
            block = reply.read1(BLOCK)  # what is there by now
        except (OSError, http.client.HTTPException) as error:
            raise broken(url, error) from None
        target.write(block)
        done, now = done + len(block), time.monotonic()
        if not block or done > most:  # too much: `check` will refuse it, no need to fill the disk first
            break
        if now - since > PATIENCE:
            if done - counted < LEAST:
                raise broken(url, f"{done - counted} bytes in {PATIENCE} seconds")
            counted, since = done, now
        if now - shown > 1:
            shown = now
            of = f" of {size / 1e6:,.0f}" if size else ""
            print(f"\r{label}: {done / 1e6:,.0f}{of} MB", end="", file=sys.stderr, flush=True)
    if not block and getattr(reply, "length", None):  # Content-Length had said more
        raise broken(url, f"{reply.length} bytes are missing")
    if size and size > BLOCK:
        print(f"\r{label}: {done / 1e6:,.0f} MB, done", file=sys.stderr)


def broken(url, why):
    """A ConnectionError for a download that ends too early."""
    return ConnectionError(f"{url}: the download broke off ({why}); run again to continue it")


def check(part, path, size, expected):
    """ValueError, and the bad file removed, unless it has the size and sha256 that the hub gave, and without a sha256
    holds what its name says, whole."""
    found = part.stat().st_size
    if size is not None and found < size:
        raise ConnectionError(f"{path.name}: {found} of {size} bytes came; run again to continue")
    digest = sha256(part)
    try:
        if size is not None and found != size or expected and digest != expected:
            raise ValueError(f"{found} bytes, sha256 {digest}")
        if not expected and is_weights(path.name):
            read_safetensors(part)
        elif not expected:
            json.loads(part.read_bytes()[:LARGEST_HEADER])
    except (ValueError, RecursionError) as error:
        part.unlink()
        raise ValueError(f"{path.name}: what came is not the hub's file ({error}); run again") from None
