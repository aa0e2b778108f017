"""Fetching from the hub, against a server of the test's own: resumed, checked, with the token where it belongs."""
import contextlib
import hashlib
import http.server
import json
import os
import threading
import time

import pytest
import torch

from tests.child import CONTEXT, ended
from tests.tiny import one_line
from weights import hub
from weights.safetensors import write_safetensors

REVISION, NEXT = "a" * 40, "b" * 40
FILES = {"config.json": b'{"x": 1}', "tokenizer.json": b"{}", "model.safetensors": bytes(range(256)) * 2000,
         "model-00001-of-00002.safetensors": b"no: transformers takes the single file", "README.md": b"no",
         "pytorch_model.bin": b"pickle", "nested/model.safetensors": b"no"}


def listing(files, revision=REVISION):
    """What the hub says of a model with these files: sizes, and the checksums of large ones."""
    entries = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
    for entry in entries:
        if entry["size"] > 99:
            entry["lfs"] = {"sha256": hashlib.sha256(files[entry["rfilename"]]).hexdigest()}
    return json.dumps({"sha": revision, "siblings": entries}).encode()


class Hub(http.server.BaseHTTPRequestHandler):
    """The two addresses that hub.py asks for, and a storage host to which files are redirected."""

    def do_GET(self):
        state = self.server.state
        state["asked"].append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        if state["status"] != 200:
            return self.reply(state["status"], b"")
        if self.path.startswith("/api/models/"):
            return self.reply(200, state["listing"] or listing(state["files"], state["revision"]))
        if self.path.startswith("/old/name/"):  # which has been renamed
            self.send_response(307)
            self.send_header("Location", f"http://{self.headers['Host']}/owner/model/{self.path.split('/', 3)[3]}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if self.path.startswith(f"/owner/model/resolve/{state['revision']}/"):
            self.send_response(302)
            self.send_header("Location", state["sends_to"] + self.path.split("/", 5)[5])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = state["bodies"][self.path[1:]]
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if state["ranges"] else 0
        return self.reply(206 if start else 200, body[start:], cut=state.pop("cut", None))

    def reply(self, status, body, cut=None):
        state = self.server.state
        self.send_response(status, state["reason"](self) if status == 500 else None)
        if state["says_length"]:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # whoever asked has gone
            for start in range(0, len(body[:cut]), state["piece"]):
                self.wfile.write(body[:cut][start:start + state["piece"]])
                time.sleep(state["pause"])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A hub and its storage on two ports; returns what they do and what they were asked."""
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) for _ in range(2)]
    state = {"asked": [], "status": 200, "files": FILES, "bodies": dict(FILES), "listing": None, "ranges": True,
             "sends_to": f"http://127.0.0.1:{servers[1].server_port}/", "revision": REVISION, "says_length": True,
             "reason": lambda asked: "Broken", "piece": 1 << 30, "pause": 0}
    for one in servers:
        one.state = state
        threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{servers[0].server_port}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield state
    for one in servers:
        one.shutdown()
        one.server_close()


def test_only_data_files_of_the_top_folder_are_fetched_and_only_once(server, tmp_path):
    """Config, tokenizer and safetensors; nothing pickled, nothing nested; a second call asks nothing."""
    assert hub.fetch("owner/model", tmp_path / "m") == tmp_path / "m"
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == {
        **{name: FILES[name] for name in ("config.json", "tokenizer.json", "model.safetensors")}, "revision.txt": b"\n".join([
            REVISION.encode(), b"8 %s config.json" % hashlib.sha256(FILES["config.json"]).hexdigest().encode(),
            b"2 %s tokenizer.json" % hashlib.sha256(b"{}").hexdigest().encode(), b"512000 - model.safetensors"])}
    asked = len(server["asked"])
    hub.fetch("owner/model", tmp_path / "m")
    assert len(server["asked"]) == asked


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_stopped(server, ranges, tmp_path):
    """What came stays; the next call asks for the rest, and takes the whole where the server cannot continue."""
    body = FILES["model.safetensors"]
    server |= {"ranges": ranges, "cut": 300_000, "files": {name: FILES[name] for name in (
        "model.safetensors", "config.json", "tokenizer.json")}}
    with pytest.raises(ConnectionError, match="run again to continue"):
        hub.fetch("owner/model", tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors.part").stat().st_size == 300_000
    assert not (tmp_path / "m" / "model.safetensors").exists()
    hub.fetch("owner/model", tmp_path / "m")
    assert ("/model.safetensors", "bytes=300000-") in [asked[:2] for asked in server["asked"]]
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == body


def test_the_token_goes_to_the_hub_and_not_to_its_storage(server, tmp_path, monkeypatch):
    """HF_TOKEN is sent to the hub; the host that it redirects to never sees it."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.fetch("owner/model", tmp_path / "m")
    for path, _, authorization in server["asked"]:
        assert authorization == ("Bearer secret" if path.startswith(("/api/", "/owner/")) else None), path


def test_the_token_follows_the_hub_to_a_models_new_name(server, tmp_path, monkeypatch):
    """A redirect within the hub carries it, and the one behind that to the storage does not; over http too, if the hub is asked so."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    with monkeypatch.context() as patch, pytest.raises(ConnectionError, match="which is not https"):
        patch.setattr(hub, "is_this_machine", lambda host: False)  # the storage is not the hub: it is what is refused
        hub.fetch("old/name", tmp_path / "m")
    hub.fetch("old/name", tmp_path / "m")
    asked = {path: authorization for path, _, authorization in server["asked"]}
    assert asked[f"/owner/model/resolve/{REVISION}/config.json"] == "Bearer secret" and asked["/config.json"] is None
    assert (tmp_path / "m" / "config.json").read_bytes() == FILES["config.json"]


@pytest.mark.parametrize("text", [" hf_secret\n", "\thf_secret", "hf_secret\r\n"])
def test_white_space_around_the_token_is_no_part_of_it(text, server, tmp_path, monkeypatch):
    """A file's line break, say."""
    monkeypatch.setenv("HF_TOKEN", text)
    hub.fetch("owner/model", tmp_path / "m")
    assert server["asked"][0][2] == "Bearer hf_secret"


@pytest.mark.parametrize("text", ["hf_secret\nX: 1", "hf_sec ret", "hf_sécret", "hf_secret\x00"])
def test_what_is_no_token_is_refused_without_being_shown(text, server, tmp_path, monkeypatch):
    """Before anything is asked."""
    monkeypatch.setattr(os, "environ", {**os.environ, "HF_TOKEN": text})  # which no real one can hold
    with pytest.raises(ValueError, match="HF_TOKEN holds") as error:
        hub.fetch("owner/model", tmp_path / "m")
    assert "hf_" not in one_line(error) and not server["asked"] and not list(tmp_path.iterdir())


def test_no_message_holds_the_token(server, tmp_path, monkeypatch):
    """Not even that of a server which says it again."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server |= {"status": 500, "reason": lambda asked: f"no {asked.headers['Authorization']}"}
    with pytest.raises(ConnectionError, match="no Bearer HF_TOKEN; try again later") as error:
        hub.fetch("owner/model", tmp_path / "m")
    assert "hf_secret" not in one_line(error)


# ---- revisions, and what is there already ---------------------------------------------------------------------------

def changed(server):
    """Let the model go on to another revision, with files of the same sizes. Returns them."""
    files = {name: body.replace(b"1", b"2")[::-1] if "safetensors" in name else body.replace(b"1", b"2")
             for name, body in server["files"].items()}
    server |= {"files": files, "bodies": files, "revision": NEXT}
    return files


def test_revisions_are_not_mixed(server, tmp_path):
    """Broken off in the weights of one revision, with its config there, a download begins again at the next one."""
    server["cut"] = 5  # of the first file, the config
    with pytest.raises(ConnectionError):
        hub.fetch("owner/model", tmp_path / "m")
    server["bodies"]["model.safetensors"] = FILES["model.safetensors"][:300_000]
    with pytest.raises(ConnectionError, match="run again to continue"):
        hub.fetch("owner/model", tmp_path / "m")
    assert (tmp_path / "m" / "config.json").exists() and (tmp_path / "m" / "model.safetensors.part").exists()
    files = changed(server)
    hub.fetch("owner/model", tmp_path / "m")
    assert server["asked"][-1][:2] == ("/model.safetensors", None)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "m" / name).read_bytes() == files[name], name


def test_files_of_an_unknown_revision_are_not_continued(server, tmp_path):
    """What an older version has left half done says of no file what it belongs to."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"x": 3}')
    (tmp_path / "m" / "model.safetensors.part").write_bytes(b"x" * 1000)
    hub.fetch("owner/model", tmp_path / "m")
    assert all((tmp_path / "m" / name).read_bytes() == FILES[name] for name in ("config.json", "model.safetensors"))


@pytest.mark.parametrize("name, damage", [
    ("tokenizer.json", lambda path: path.write_text("[]")), ("config.json", lambda path: path.write_text('{"x": 7}')),
    ("model.safetensors", lambda path: os.truncate(path, 5)), ("model.safetensors", lambda path: path.unlink()),
    ("revision.txt", lambda path: path.write_text(""))])
def test_what_is_damaged_in_the_cache_is_fetched_again(name, damage, server, tmp_path, capsys):
    """It, and nothing else, unless it is the record of what was there."""
    hub.fetch("owner/model", tmp_path / "m")
    before, asked = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}, len(server["asked"])
    damage(tmp_path / "m" / name)
    hub.fetch("owner/model", tmp_path / "m")
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    if name != "revision.txt":
        assert [path for path, *_ in server["asked"][asked + 1:]] == [f"/owner/model/resolve/{REVISION}/{name}", f"/{name}"]
        assert f"{tmp_path / 'm' / name} is not as it was fetched: it is fetched again\n" in capsys.readouterr().err


def test_a_folder_of_an_older_version_is_taken(server, tmp_path):
    """Its revision.txt holds the revision alone."""
    hub.fetch("owner/model", tmp_path / "m")
    (tmp_path / "m" / "revision.txt").write_text(REVISION)
    asked = len(server["asked"])
    hub.fetch("owner/model", tmp_path / "m")
    assert len(server["asked"]) == asked


# ---- several processes, and none that lives ---------------------------------------------------------------------------

def fetching(endpoint, folder, said):
    """hub.fetch, in a process of its own."""
    os.environ["HF_ENDPOINT"] = endpoint
    with open(said, "a") as file, contextlib.redirect_stderr(file):
        hub.fetch("owner/model", folder)


def started(folder):
    """A process that fetches into a folder."""
    process = CONTEXT.Process(target=fetching, args=(os.environ["HF_ENDPOINT"], folder, folder.with_name("said")))
    process.start()
    return process


def two_fetches(server, folder):
    """Both get all of it, one by waiting for the other."""
    server |= {"piece": 50_000, "pause": 0.01}
    statuses = [ended(process) for process in [started(folder / "m"), started(folder / "m")]]
    assert statuses == [0, 0], (folder / "said").read_text()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (folder / "m" / name).read_bytes() == FILES[name]
        assert [path for path, *_ in server["asked"]].count(f"/{name}") == 1
    assert {path.name for path in folder.iterdir()} == {"m", "said"}
    assert "waiting for process " in (folder / "said").read_text()


def test_two_processes_fetch_one_model_once(server, tmp_path):
    for trial in range(2):
        server["asked"].clear()
        (tmp_path / str(trial)).mkdir()
        two_fetches(server, tmp_path / str(trial))


@pytest.mark.long
def test_two_processes_fetch_one_model_once_in_twenty_trials(server, tmp_path):
    for trial in range(20):
        server["asked"].clear()
        (tmp_path / str(trial)).mkdir()
        two_fetches(server, tmp_path / str(trial))


def test_a_killed_download_goes_on(server, tmp_path):
    """SIGKILL in the middle of the weights: the lock that is left holds nobody up, and the rest is asked for."""
    server |= {"piece": 50_000, "pause": 0.1}
    process, part = started(tmp_path / "m"), tmp_path / "m" / "model.safetensors.part"
    while not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    process.kill()
    assert ended(process) == 137 and list(tmp_path.glob("m.lock*"))
    server["pause"] = 0
    hub.fetch("owner/model", tmp_path / "m")
    assert server["asked"][-1][1].startswith("bytes=") and not list(tmp_path.glob("m.lock*"))
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == FILES["model.safetensors"]


# ---- servers of other kinds -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("says_length", [True, False])
def test_a_cut_file_is_noticed_without_a_size(name, says_length, server, tmp_path):
    """By the reply's length, or else by its content: the listing gives neither size nor checksum."""
    write_safetensors(tmp_path / "weights", {"a": torch.ones(300)})
    bodies = {"config.json": b"{}", "tokenizer.json": b'{"model": 1}', "model.safetensors": (tmp_path / "weights").read_bytes()}
    entries = [{"rfilename": file} for file in bodies]
    server |= {"bodies": bodies, "listing": json.dumps({"sha": REVISION, "siblings": entries}).encode(), "says_length": says_length}
    whole, reply = bodies[name], Hub.reply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hub, "reply", lambda self, status, body, cut=None: reply(self, status, body, -2 if body == whole else cut))
        with pytest.raises((ConnectionError, ValueError), match="run again") as error:
            hub.fetch("owner/model", tmp_path / "m")
        assert name in one_line(error) and not (tmp_path / "m" / name).exists()
    hub.fetch("owner/model", tmp_path / "m")
    assert {file: (tmp_path / "m" / file).read_bytes() for file in bodies} == bodies


@pytest.mark.parametrize("where", ["http://192.0.2.1/", "ftp://127.0.0.1/", "file:///etc/", "http://localhost.example/", "//192.0.2.1/"])
def test_only_https_or_this_machine_is_followed(where, server, tmp_path):
    """A redirect to anything else is refused, unasked."""
    server["sends_to"] = where
    with pytest.raises(ConnectionError, match="which is not https|not allowed") as error:
        hub.fetch("owner/model", tmp_path / "m")
    assert one_line(error)


def test_what_this_machine_is():
    """By name and by number."""
    assert all(map(hub.is_this_machine, ("localhost", "127.0.0.1", "127.1.2.3", "::1")))
    assert not any(map(hub.is_this_machine, (None, "", "0.0.0.0", "192.168.0.1", "localhost.example", "127.0.0.1.example")))


@pytest.mark.parametrize("what", ["/api/", "/model.safetensors"])
def test_a_trickle_is_given_up(what, server, tmp_path, monkeypatch):
    """A byte now and then is no download, of a listing or of a file, though no single read of it takes long."""
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    reply = Hub.reply
    monkeypatch.setattr(Hub, "reply", lambda self, *given, **more: (
        server.update(piece=10 if self.path.startswith(what) else 1 << 30, pause=0.02), reply(self, *given, **more)))
    with pytest.raises(ConnectionError, match=r"the download broke off \(\d+ bytes in 0.2 seconds\); run again"):
        hub.fetch("owner/model", tmp_path / "m")


def test_a_reply_that_never_begins_is_given_up(server, tmp_path, monkeypatch):
    """Headers that come byte by byte are no answer."""
    monkeypatch.setattr(hub, "PATIENCE", 0.2)

    def drip(self):
        for piece in (b"HTTP/1.0 200 OK\r\n", *[b"X: 1\r\n"] * 5, b"\r\n"):
            self.wfile.write(piece)
            time.sleep(0.15)
    monkeypatch.setattr(Hub, "do_GET", drip)
    with pytest.raises(ConnectionError, match="no connection .no answer in 0.4 seconds"):
        hub.fetch("owner/model", tmp_path / "m")


def test_a_file_that_is_not_the_hubs_is_thrown_away(server, tmp_path):
    """A body of the right length with other bytes fails its sha256, and leaves nothing to continue from."""
    server["bodies"]["model.safetensors"] = FILES["model.safetensors"][::-1]
    with pytest.raises(ValueError, match="model.safetensors: what came is not the hub's file"):
        hub.fetch("owner/model", tmp_path / "m")
    assert not [path for path in (tmp_path / "m").iterdir() if "safetensors" in path.name]


@pytest.mark.parametrize("status, message", [
    (401, "owner/model: no folder here, and the hub refuses access .401.*set HF_TOKEN"), (403, "set HF_TOKEN"),
    (404, "the hub has no such model"), (500, "try again later"),
])
def test_refusals_say_what_to_do(server, status, message, tmp_path):
    """Gated, absent, or broken: one line each, nothing left behind."""
    server["status"] = status
    with pytest.raises(ConnectionError, match=message) as error:
        hub.fetch("owner/model", tmp_path / "m")
    assert one_line(error) and not (tmp_path / "m").exists()


@pytest.mark.parametrize("answer", [
    b"<html>", b"[]", b'{"sha": 5}', b'{"sha": "x", "siblings": [{"rfilename": "model.safetensors"}]}'])
def test_an_answer_that_is_no_listing_is_refused(server, answer, tmp_path):
    """What the hub says is not believed: a revision is 40 hexadecimal digits, files have names."""
    server["listing"] = answer
    with pytest.raises(ConnectionError, match="not a list of files|no revision"):
        hub.fetch("owner/model", tmp_path / "m")


def test_a_model_with_pickled_weights_only_is_refused(server, tmp_path):
    """Nothing pickled is ever fetched."""
    server["files"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(ValueError, match="has no safetensors files"):
        hub.fetch("owner/model", tmp_path / "m")


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_model_that_could_not_be_loaded_is_not_fetched(missing, server, tmp_path):
    """Nothing is downloaded of one without its configuration, or a tokenizer."""
    server["files"] = {name: content for name, content in FILES.items() if name != missing}
    with pytest.raises(ValueError, match=f"this model has no {missing}, without which"):
        hub.fetch("owner/model", tmp_path / "m")
    assert len(server["asked"]) == 1 and not (tmp_path / "m").exists()


def test_without_a_connection(monkeypatch, tmp_path):
    """One line that says how to do without."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="no connection .*pass --model FOLDER"):
        hub.fetch("owner/model", tmp_path / "m")


@pytest.mark.parametrize("endpoint", ["/api", "huggingface.co", "http://", "http://[::1", "ftp://there"])
def test_an_endpoint_that_is_no_address_is_named(endpoint, monkeypatch, tmp_path):
    """Instead of what urllib says of it."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ValueError, match="^HF_ENDPOINT is .* no address: set it as in https://huggingface.co, or unset it$"):
        hub.fetch("owner/model", tmp_path / "m")


def test_what_is_a_hub_id():
    """owner/name; not a path, and not a file."""
    assert hub.is_hub_id("owner/model-1.5_b")
    assert not any(map(hub.is_hub_id, ("model", "a/b/c", "x/y.gguf", "../model", "owner/..", "./model", "/model")))
