"""Hub ids, against a hub of our own: the normal way for users, from another process, since its address is read at import."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that loading needs.

    Serves ROOT/models/OWNER/NAME and ROOT/datasets/OWNER/NAME, each as a repository of one commit.
    """

    root: Path

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api" and len(parts) >= 4:
            self._interface(self.root.joinpath(*parts[1:4]), parts[4:])
            return
        kind = "datasets" if parts[0] == "datasets" else "models"
        owner_and_name, rest = (parts[1:3], parts[3:]) if kind == "datasets" else (parts[:2], parts[2:])
        self._file(self.root.joinpath(kind, *owner_and_name), Path(*rest[2:]))  # rest: resolve, a revision, the file

    do_HEAD = do_GET

    def _interface(self, repository: Path, rest: list[str]) -> None:
        """api/KIND/OWNER/NAME: of the repository itself, or of the files below tree/REVISION/FOLDER."""
        folder = repository.joinpath(*rest[2:]) if rest[:1] == ["tree"] else repository
        if not folder.is_dir():
            self._missing("RepoNotFound" if folder == repository else "EntryNotFound")
            return
        files = [file.relative_to(repository).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "oid": "0" * 40, "size": (repository / file).stat().st_size, "path": file} for file in files
            ]
            self._send(200, json.dumps(entries).encode(), {})
            return
        about = {"id": "/".join(repository.parts[-2:]), "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
        self._send(200, json.dumps(about).encode(), {})

    def _file(self, repository: Path, name: Path) -> None:
        if not (repository / name).is_file():
            self._missing("EntryNotFound" if repository.is_dir() else "RepoNotFound")
            return
        content = (repository / name).read_bytes()
        self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        """Nothing: the test's output stays readable."""


@pytest.fixture
def hub(model_dir: Path, sums: Path, tmp_path: Path) -> Iterator[str]:
    """Its address. It knows the model owner/tiny and the data set owner/sums, which has two configurations."""
    root = tmp_path / "hub"
    shutil.copytree(model_dir, root / "models" / "owner" / "tiny")
    data = root / "datasets" / "owner" / "sums"
    data.mkdir(parents=True)
    for name in ("small", "large"):
        shutil.copy(sums, data / f"{name}.jsonl")
    configurations = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("small", "large")]
    (data / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configurations})}---\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("ThisHub", (Hub,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def gradlite(hub: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    proxies = {key: "" for key in os.environ if key.lower().endswith("_proxy")}
    environment = {**os.environ, **proxies, "HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "gradlite", "train", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_model_and_a_data_set_of_the_hub(hub: str, tmp_path: Path) -> None:
    settings = ("--max-steps", "2", "--seq-len", "96", "--eval-examples", "2", "--output-dir", str(tmp_path / "runs"))
    ids = ("--model", "owner/tiny", "--dataset", "owner/sums")
    done = gradlite(hub, tmp_path / "home", *ids, "--dataset-config", "small", *settings)
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "runs").glob("*/run.json")
    assert json.loads(record.read_text())["status"] == "finished"
    card = (record.parent / "README.md").read_text()
    assert "base_model: owner/tiny" in card
    assert "- owner/sums" in card


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (("owner/none", "owner/sums"), "model 'owner/none' is neither a local directory nor could it be loaded from the hub"),
        (("owner/tiny", "owner/none"), "dataset 'owner/none' is neither a local file or directory nor could it be loaded"),
        (("owner/tiny", "owner/sums"), "dataset 'owner/sums' has several configurations: give one of ['small', 'large']"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_sentence(ids: tuple[str, str], message: str, hub: str, tmp_path: Path) -> None:
    failed = gradlite(hub, tmp_path / "home", "--model", ids[0], "--dataset", ids[1], "--output-dir", str(tmp_path / "runs"))
    assert failed.returncode == 2
    assert message in " ".join(failed.stderr.split())
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "runs").exists()
