"""A model of the Hugging Face hub, fetched with the standard library: `fetch("HuggingFaceTB/SmolLM2-360M", folder)`.

Only data is fetched: config, tokenizer and safetensors files of one revision, each checked by size and, where the hub
gives one, by its sha256. A download that broke off goes on where it stopped. `HF_TOKEN` opens gated models.
"""
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from weights.files import LARGEST_HEADER, sha256

NAMED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "chat_template.jinja", "model.safetensors.index.json")
BLOCK = 1 << 20


def is_hub_id(name):
    """Whether `name` looks like owner/model."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not name.endswith(".gguf")


def fetch(name, folder):
    """Bring the files of the model called `name` ("owner/model") into `folder`; returns it.

    Files that are there are not fetched again. Raises ConnectionError without a connection, for a name the hub does not
    have, or for a gated model without a token; ValueError for a file that is not what the hub says it is.
    """
    folder = Path(folder)
    done = folder / "revision.txt"  # written last: the folder is complete
    if done.is_file():
        return folder
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    with request(f"{endpoint}/api/models/{name}?blobs=true", name) as reply:
        try:
            listing = json.loads(reply.read(LARGEST_HEADER))
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
    folder.mkdir(parents=True, exist_ok=True)
    for file in wanted:
        size, lfs = file.get("size"), file.get("lfs")
        download(f"{endpoint}/{name}/resolve/{revision}/{file['rfilename']}", folder / file["rfilename"], name,
                 size if type(size) is int else None, lfs.get("sha256") if isinstance(lfs, dict) else None)
    done.write_text(revision)
    return folder


def is_weights(filename, single=False):
    """model.safetensors, or (not beside a single file) a shard of it; in the top folder only."""
    return re.fullmatch(r"model" + r"(-\d{5}-of-\d{5})?" * (not single) + r"\.safetensors", filename) is not None


def request(url, name, start=0):
    """An open reply to a GET of `url` from byte `start` on. ConnectionError in words for what goes wrong."""
    headers = {"User-Agent": "lora-reference", **({"Range": f"bytes={start}-"} if start else {})}
    asked = urllib.request.Request(url, headers=headers)
    if os.environ.get("HF_TOKEN"):
        # Not passed on when the hub sends us to its storage: that host must not see it.
        asked.add_unredirected_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
    try:
        return urllib.request.urlopen(asked, timeout=30)
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


def download(url, path, name, size, expected):
    """Fetch one file to `path`, from where an earlier attempt stopped; checked, then renamed: whole or not there."""
    if path.is_file():
        return
    part = path.with_name(path.name + ".part")
    start = part.stat().st_size if part.is_file() else 0
    if size is None or start >= size:
        start = 0
    with request(url, name, start) as reply, open(part, "ab" if reply.status == 206 else "wb") as target:
        try:
            copy(reply, target, path.name, target.tell(), size)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"{url}: the download broke off ({error}); run again to continue it") from None
    check(part, path, size, expected)
    os.replace(part, path)


def copy(reply, target, label, done, size):
    """Copy a reply to a file, with a line of progress on a terminal's stderr."""
    shown = time.time()
    while block := reply.read(BLOCK):
        target.write(block)
        done += len(block)
        if size is not None and done > size:  # `check` will refuse it: no need to fill the disk first
            break
        if time.time() - shown > 1:
            shown = time.time()
            of = f" of {size / 1e6:,.0f}" if size else ""
            print(f"\r{label}: {done / 1e6:,.0f}{of} MB", end="", file=sys.stderr, flush=True)
    if size and size > BLOCK:
        print(f"\r{label}: {done / 1e6:,.0f} MB, done", file=sys.stderr)


def check(part, path, size, expected):
    """ValueError, and the bad file removed, unless it has the size and sha256 that the hub gave."""
    found = part.stat().st_size
    if size is not None and found < size:
        raise ConnectionError(f"{path.name}: {found} of {size} bytes came; run again to continue")
    digest = sha256(part)
    if size is not None and found != size or expected and digest != expected:
        part.unlink()
        raise ValueError(f"{path.name}: what came is not the hub's file ({found} bytes, sha256 {digest}); run again")
