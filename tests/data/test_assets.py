"""``tst assets`` against a hub of this test: same requests, same answers."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from jobs import ROOT

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """The hub's answers for one model, owner/model, and 401 for all others."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if path.startswith("/api/models/owner/model/revision/"):
            files = [{"rfilename": name} for name in self.files]
            self.send(
                200, json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": files}), body
            )
        elif path.startswith("/api/models/owner/model/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": "0"}
                for name, content in self.files.items()
            ]
            self.send(200, json.dumps(tree), body)
        elif path.startswith("/owner/model/resolve/") and name in self.files:
            self.asked += [name] * body
            self.send(200, self.files[name], body)
        else:
            self.send(401, '{"error": "Repository not found"}', body)

    def send(self, code: int, content: bytes | str, body: bool):
        content = content.encode() if isinstance(content, str) else content
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(corpus, tmp_path, tst, monkeypatch):
    """Run the command against the hub, in this process."""
    files = {path.name: path.read_bytes() for path in (corpus / "tokenizer").iterdir()}
    files |= {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"read me"}
    handler = type("OneHub", (Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("localhost", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(*args: str):
        return tst("assets", "--local-dir", tmp_path, *args)

    # as HF_ENDPOINT and others had it when this was imported
    endpoint = f"http://localhost:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    url = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("no_proxy", "localhost")
    close_session()  # which remembers proxies

    run.asked, run.files = handler.asked, files
    yield run
    server.shutdown()
    server.server_close()


def test_tokenizer_and_config(hub, tmp_path, corpus):
    result = hub("owner/model")
    assert result.code == 0, result.stderr
    assert f"model.hf_assets_path = {tmp_path / 'model'}" in result.stdout
    assert "tokenizer with 1,024 entries" in result.stdout
    wanted = {path.name for path in (corpus / "tokenizer").iterdir()} | {"config.json"}
    assert {path.name for path in (tmp_path / "model").iterdir() if path.is_file()} == wanted
    for path in (corpus / "tokenizer").iterdir():
        assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes()
    assert sorted(hub.asked) == sorted(wanted)
    assert hub("owner/model").code == 0
    assert len(hub.asked) == len(wanted), "fetched once"


def test_other_assets(hub, tmp_path):
    result = hub("owner/model", "--assets", "safetensors")
    assert result.code == 0, result.stderr
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"weights"
    assert hub.asked == ["model.safetensors"]


def test_errors_say_what_is_wrong(hub, tmp_path):
    result = hub("owner/model", "--assets", "index")
    assert result.code == 2
    assert "owner/model has no index (model.safetensors.index.json)" in result.stderr
    result = hub("owner/secret")
    assert result.code == 2
    assert (
        "error: cannot download owner/secret from the hub; " in result.stderr
        and "401" in result.stderr
    )
    assert "Traceback" not in result.stderr
    assert not (Path(tmp_path) / "secret" / "tokenizer.json").exists()


def test_a_tokenizer_that_cannot_be_used_is_named(hub):
    hub.files["tokenizer.json"] = b"<!DOCTYPE html>"
    result = hub("owner/model")
    assert result.code == 2
    assert "error: owner/model: tokenizer.json is a web page" in result.stderr


@pytest.mark.slow
def test_no_hub(tmp_path):
    command = [sys.executable, "-m", "torchtitan.experiments.tst", "assets", "owner/model"]
    result = subprocess.run(
        [*command, "--local-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"HF_ENDPOINT": "http://localhost:9", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: owner/model: ")
