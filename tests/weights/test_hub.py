"""Fetching from the hub, against a server of the test's own: resumed, checked, with the token where it belongs."""
import hashlib
import http.server
import json
import threading

import pytest

from tests.tiny import one_line
from weights import hub

REVISION = "a" * 40
FILES = {"config.json": b'{"x": 1}', "tokenizer.json": b"{}", "model.safetensors": bytes(range(256)) * 2000,
         "model-00001-of-00002.safetensors": b"no: transformers takes the single file", "README.md": b"no",
         "pytorch_model.bin": b"pickle", "nested/model.safetensors": b"no"}


def listing(files):
    """What the hub says of a model with these files: sizes, and the checksums of large ones."""
    entries = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
    for entry in entries:
        if entry["size"] > 99:
            entry["lfs"] = {"sha256": hashlib.sha256(files[entry["rfilename"]]).hexdigest()}
    return json.dumps({"sha": REVISION, "siblings": entries}).encode()


class Hub(http.server.BaseHTTPRequestHandler):
    """The two addresses that hub.py asks for, and a storage host to which files are redirected."""

    def do_GET(self):
        state = self.server.state
        state["asked"].append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        if state["status"] != 200:
            return self.reply(state["status"], b"")
        if self.path.startswith("/api/models/"):
            return self.reply(200, state["listing"] or listing(state["files"]))
        if self.path.startswith(f"/owner/model/resolve/{REVISION}/"):
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{state['storage']}/{self.path.split('/', 5)[5]}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = state["bodies"][self.path[1:]]
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if state["ranges"] else 0
        return self.reply(206 if start else 200, body[start:], cut=state.pop("cut", None))

    def reply(self, status, body, cut=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A hub and its storage on two ports; returns what they do and what they were asked."""
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) for _ in range(2)]
    state = {"asked": [], "status": 200, "files": FILES, "bodies": dict(FILES), "listing": None, "ranges": True,
             "storage": servers[1].server_port}
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
        **{name: FILES[name] for name in ("config.json", "tokenizer.json", "model.safetensors")}, "revision.txt": REVISION.encode()}
    asked = len(server["asked"])
    hub.fetch("owner/model", tmp_path / "m")
    assert len(server["asked"]) == asked


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_stopped(server, ranges, tmp_path):
    """What came stays; the next call asks for the rest, and takes the whole where the server cannot continue."""
    body = FILES["model.safetensors"]
    server |= {"ranges": ranges, "files": {"model.safetensors": body}, "cut": 300_000}
    with pytest.raises(ConnectionError, match="run again to continue"):
        hub.fetch("owner/model", tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors.part").stat().st_size == 300_000
    assert not (tmp_path / "m" / "model.safetensors").exists()
    hub.fetch("owner/model", tmp_path / "m")
    assert server["asked"][-1][:2] == ("/model.safetensors", "bytes=300000-")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == body


def test_the_token_goes_to_the_hub_and_not_to_its_storage(server, tmp_path, monkeypatch):
    """HF_TOKEN is sent to the hub; the host that it redirects to never sees it."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.fetch("owner/model", tmp_path / "m")
    for path, _, authorization in server["asked"]:
        assert authorization == ("Bearer secret" if path.startswith(("/api/", "/owner/")) else None), path


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


def test_without_a_connection(monkeypatch, tmp_path):
    """One line that says how to do without."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="no connection .*pass --model FOLDER"):
        hub.fetch("owner/model", tmp_path / "m")


def test_what_is_a_hub_id():
    """owner/name; not a path, and not a file."""
    assert hub.is_hub_id("owner/model-1.5_b")
    assert not any(map(hub.is_hub_id, ("model", "a/b/c", "x/y.gguf", "../model", "owner/..", "./model", "/model")))
