"""scripts/download_hf_assets.py against a hub of this test: same requests, same answers."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

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
def hub(corpus, tmp_path):
    """Run the script against the hub."""
    files = {path.name: path.read_bytes() for path in (corpus / "tokenizer").iterdir()}
    files |= {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"read me"}
    handler = type("OneHub", (Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("localhost", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(*args: str, endpoint: str = f"http://localhost:{server.server_port}"):
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1", "no_proxy": "localhost"}
        return subprocess.run(
            [sys.executable, "scripts/download_hf_assets.py", "--local_dir", str(tmp_path), *args],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )

    run.asked = handler.asked
    yield run
    server.shutdown()
    server.server_close()


def test_tokenizer_and_config(hub, tmp_path, corpus):
    result = hub("--repo_id", "owner/model")
    assert result.returncode == 0, result.stderr
    assert f"model.hf_assets_path = {tmp_path / 'model'}" in result.stdout
    assert "tokenizer with 1,024 entries" in result.stdout
    wanted = {path.name for path in (corpus / "tokenizer").iterdir()} | {"config.json"}
    assert {path.name for path in (tmp_path / "model").iterdir() if path.is_file()} == wanted
    for path in (corpus / "tokenizer").iterdir():
        assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes()
    assert sorted(hub.asked) == sorted(wanted)
    assert hub("--repo_id", "owner/model").returncode == 0
    assert len(hub.asked) == len(wanted), "fetched once"


def test_other_assets(hub, tmp_path):
    result = hub("--repo_id", "owner/model", "--assets", "safetensors")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"weights"
    assert hub.asked == ["model.safetensors"]


def test_errors_say_what_is_wrong(hub, tmp_path):
    result = hub("--repo_id", "owner/model", "--assets", "index")
    assert result.returncode == 1
    assert "owner/model has no index (model.safetensors.index.json)" in result.stderr
    result = hub("--repo_id", "owner/secret")
    assert result.returncode == 1
    assert "error: owner/secret: " in result.stderr and "401" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (Path(tmp_path) / "secret" / "tokenizer.json").exists()


@pytest.mark.slow
def test_no_hub(hub):
    result = hub("--repo_id", "owner/model", endpoint="http://localhost:9")
    assert result.returncode == 1
    assert result.stderr.startswith("error: owner/model: ")
