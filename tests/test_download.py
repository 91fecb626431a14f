"""Models by hub id, from a small hub-like server on loopback: what is fetched, resumed, refused and found offline."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny_hub
import torch

import fewfire
from fewfire.checkpoints.download import HubId, looks_like_hub_id
from fewfire.errors import ConfigError
from fewfire.tokenizer import train_bpe

COMMIT = {"main": "a" * 40, "v2": "b" * 40}
NEEDED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
}
NOT_NEEDED = {"pytorch_model.bin", "consolidated.safetensors", "README.md", "original/params.json", "model.gguf"}


class Hub(ThreadingHTTPServer):
    """Serves `repos` (id -> files by name) as the hub does; `log` has the files asked for, `cut` breaks a transfer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.log: list[tuple[str, str, str | None]] = []
        self.cut: dict[str, int] = {}
        self.broken = False


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def do_GET(self) -> None:
        self.respond(body=True)

    def respond(self, *, body: bool) -> None:
        if self.server.broken:
            return self.answer(500, b"{}", body)
        path = self.path.split("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?.*", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo, revision = (api[1], api[3] or "main") if api else (file[1], file[2]) if file else ("", "")
        if repo not in self.server.repos:
            return self.answer(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        commit = COMMIT.get(revision) or (revision if revision in COMMIT.values() else None)
        if commit is None:
            return self.answer(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        files = self.server.repos[repo]
        if api:
            return self.answer(200, self.describe(repo, commit, files, tree=api[2] == "tree"), body)
        assert file
        if repo in self.server.gated:
            return self.answer(403, b"{}", body, {"X-Error-Code": "GatedRepo", "X-Repo-Commit": commit})
        if file[3] not in files:
            return self.answer(404, b"", body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        self.send_file(file[3], files[file[3]], commit, body)

    def describe(self, repo: str, commit: str, files: dict[str, bytes], *, tree: bool) -> bytes:
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]
        siblings = [{"rfilename": name} for name in files]
        return json.dumps(entries if tree else {"id": repo, "sha": commit, "siblings": siblings}).encode()

    def send_file(self, name: str, content: bytes, commit: str, body: bool) -> None:
        wanted = self.headers.get("Range")
        if body:
            self.server.log.append((name, commit, wanted))
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(
            206 if wanted else 200,
            content[start:],
            body,
            headers,
            cut=self.server.cut.pop(name, None) if body else None,
        )

    def answer(
        self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if body:
            self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    torch.set_num_threads(1)
    tokenizer = train_bpe(["the hub holds models that others trained"] * 4, 280)
    model = tiny_hub.make("qwen3_moe", vocab_size=tokenizer.vocab_size)
    folder = tiny_hub.save(model, tmp_path_factory.mktemp("model"), max_shard_size="60KB")
    tokenizer.save(folder)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sum(name.endswith(".safetensors") for name in found) > 2
    return found | dict.fromkeys(NOT_NEEDED, b"nobody needs this")


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """The server, and a client that knows no other and has an empty cache."""
    from huggingface_hub import constants

    server = Hub()
    server.repos["org/model"] = dict(files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    point_client_at(server.endpoint, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def point_client_at(endpoint: str, monkeypatch) -> None:
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


def offline(monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_only_what_is_needed_is_fetched_once(hub, files, capfd):
    model = fewfire.load("org/model")
    asked = [name for name, _, _ in hub.log]
    weights = {name for name in files if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)}
    assert set(asked) == NEEDED & files.keys() | weights and len(asked) == len(set(asked))
    assert model.tokenizer is not None and len(model.generate("the hub", max_tokens=3).token_ids) == 3
    hub.log.clear()
    again = fewfire.load("org/model")
    assert hub.log == []
    assert again.module.embed.weight.equal(model.module.embed.weight)
    assert capfd.readouterr().err == ""


def test_a_revision_is_its_own_model(hub, files):
    fewfire.load("org/model@v2")
    assert {commit for _, commit, _ in hub.log} == {COMMIT["v2"]}
    fewfire.load(f"org/model@{COMMIT['main']}")
    with pytest.raises(ConfigError, match="no revision v9"):
        fewfire.load("org/model@v9")


def test_a_broken_transfer_is_resumed(hub, files, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what arrived is kept in steps of this
    name = next(name for name in files if name.startswith("model-00002"))
    hub.cut[name] = len(files[name]) // 2
    fewfire.load("org/model")
    ranges = [wanted for asked, _, wanted in hub.log if asked == name]
    assert ranges[0] is None and ranges[1] is not None and int(ranges[1][6:-1]) > 0


def test_offline_finds_what_was_downloaded(hub, monkeypatch):
    expected = fewfire.load("org/model").module.embed.weight
    offline(monkeypatch)
    hub.log.clear()
    assert fewfire.load("org/model").module.embed.weight.equal(expected) and hub.log == []
    with pytest.raises(ConfigError, match="org/other is not downloaded"):
        fewfire.load("org/other")


def test_a_server_that_is_gone_is_as_good_as_offline(hub, monkeypatch):
    fewfire.load("org/model")
    point_client_at("http://127.0.0.1:9", monkeypatch)
    fewfire.load("org/model")
    with pytest.raises(ConfigError, match="cannot be reached"):
        fewfire.load("org/other")


def test_what_the_hub_refuses_is_one_line(hub, files):
    hub.repos |= {"org/gated": files, "org/empty": {"README.md": b""}, "org/bin": {**files}}
    hub.gated.add("org/gated")
    for name in [each for each in files if "safetensors" in each]:
        hub.repos["org/bin"].pop(name)
    for name, message in [
        ("org/absent", "not on the hub"),
        ("org/gated", "is gated"),
        ("org/empty", "no config.json"),
        ("org/bin", "no model.safetensors"),
        ("org/model/absent.gguf", "absent.gguf is not in its repository"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            fewfire.load(name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    hub.broken = True
    with pytest.raises(ConfigError, match="org/model"):
        fewfire.load("org/model")


def test_one_gguf_file_of_a_repository(hub, files, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in files.items():
        if "/" not in name:
            (folder / name).write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_topk_prob": True}))
    fewfire.api.export(folder, tmp_path / "x.gguf", to="gguf", quant="q8_0")
    hub.repos["org/quants"] = {"model-Q8_0.gguf": (tmp_path / "x.gguf").read_bytes(), "other.gguf": b"-"}
    model = fewfire.load("org/quants/model-Q8_0.gguf")
    assert [name for name, _, _ in hub.log] == ["model-Q8_0.gguf"]
    assert model.config.family == "qwen3_moe" and model.generate("the hub", max_tokens=2).token_ids


def test_a_folder_wins_over_a_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    with pytest.raises(ConfigError, match="config.json cannot be read"):
        fewfire.load("org/model")
    assert hub.log == []


@pytest.mark.parametrize(
    ("text", "valid"),
    [("a/b", True), ("a/b@main", True), ("a/b/c.gguf", True), ("a/b/c/d.gguf@x", True), ("a", False), ("a/b/c", False)]
    + [("/a/b", False), ("../b", False), ("./a/b", False), ("a/b@", False), ("a b/c", False), ("", False)],
)
def test_the_form_of_a_hub_id(text, valid):
    assert looks_like_hub_id(text) == valid
    if not valid:
        with pytest.raises(ConfigError, match="hub id"):
            HubId(text)


def test_names_that_are_shapes_only():
    with pytest.raises(ConfigError, match="shape without weights"):
        fewfire.load("mixtral-8x7b")


def test_the_command_line_downloads(hub, tmp_path):
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    words = ["generate", "org/model", "--prompt", "the hub", "--max-tokens", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "fewfire", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **settings, "HF_HUB_DISABLE_XET": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 2
    assert any((tmp_path / "home").rglob("model-00001-of-*.safetensors"))


def test_a_resolved_path_is_a_folder_to_load(hub):
    folder = fewfire.api.locate("org/model")
    assert isinstance(folder, Path) and (folder / "config.json").is_file()
