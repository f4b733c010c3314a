"""A model of the hub, from a hub of the test's own on this machine."""

import http.server
import json
import threading
import urllib.parse

import pytest
import torch
from conftest import flags_for, read_metrics, run_train
from huggingface_hub import constants

import dist
from run import display, download

COMMIT = "1" * 40
MODEL = "someone/tiny"


@pytest.fixture
def hub(model_folder):
    """Serves the files of the tiny model → what was asked for."""
    files = {file.name: file.read_bytes() for file in model_folder.iterdir() if file.is_file()}
    files["original/consolidated.safetensors"] = b"the same weights once more"
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = urllib.parse.unquote(self.path.partition("?")[0])
            asked.append(path)
            name = path.rpartition(f"/resolve/{COMMIT}/")[2] or path.rpartition("/resolve/main/")[2]
            if path.startswith(f"/api/models/{MODEL}/tree/"):
                return self.answer(json.dumps([entry(*file) for file in files.items()]).encode())
            if path.startswith(f"/api/models/{MODEL}"):
                siblings = [{"rfilename": name} for name in files]
                told = {"id": MODEL, "sha": COMMIT, "siblings": siblings}
                return self.answer(json.dumps(told).encode())
            if name in files:
                return self.answer(files[name], ETag=f'"{abs(hash(files[name])):x}"')
            return self.answer(b"", 404, **{"X-Error-Code": "EntryNotFound"})

        def answer(self, body, status=200, **headers):
            self.send_response(status)
            for header, value in ({"X-Repo-Commit": COMMIT} | headers).items():
                self.send_header(header, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    def entry(name, content):
        return {
            "type": "file",
            "path": name,
            "size": len(content),
            "oid": f"{abs(hash(content)):x}",
        }

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_model_of_the_hub_is_fetched_once_a_node_and_trained(hub, plugin, tmp_path):
    address, asked = hub
    flags = flags_for(MODEL, plugin, tmp_path / "out", max_steps=1)
    place = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    said = run_train(*flags, processes=2, **place).stdout
    assert f"fetching {MODEL}" in said
    assert len(read_metrics(tmp_path / "out")) == 1
    assert not any("consolidated" in path for path in asked)
    weights = [path for path in asked if path.endswith("model.safetensors")]
    assert len(weights) == 2  # its size, and it


def test_its_bytes_are_told(hub, model_folder, monkeypatch, tmp_path):
    address, asked = hub
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    told = []
    monkeypatch.setattr(display, "report_bytes", lambda *numbers: told.append(numbers))
    download.fetch(dist.World(0, 1, torch.device("cpu")), MODEL)
    files = [file for file in model_folder.iterdir() if file.is_file()]
    assert told[-1] == (sum(file.stat().st_size for file in files),) * 2
    asked.clear()
    download.fetch(dist.World(0, 1, torch.device("cpu")), str(model_folder))
    assert not asked  # a folder is no model of the hub


def test_what_cannot_be_had_is_left_to_who_reads_the_model(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    download.fetch(dist.World(0, 1, torch.device("cpu")), "nobody/nothing")
