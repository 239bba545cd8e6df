"""A dataset on the Hub, served by a small read-only server that speaks the Hub's protocol on this machine."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import datasets
import pytest

Rows = Callable[..., datasets.Dataset]
COMMIT = "a" * 40

CLIENT = """
import itertools, sys
from hf_ssl.data.loader import TrainLoader
from hf_ssl.data.sources import DataError, open_images
sys.path.insert(0, sys.argv[1])
from conftest import NumberedViews

source = open_images("me/numbers")
print(source.describe())
loader = TrainLoader(source, NumberedViews(), batch_size=10, seed=0, num_workers=1)
print(sorted(int(i) for batch in itertools.islice(loader, 4) for i in batch["sample_id"]) == list(range(40)))
for name, split in (("me/numbers", "dev"), ("me/nothing", None)):
    try:
        open_images(name, split=split)
    except DataError as error:
        print(error)
"""


def make_handler(folder: Path, ranges: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(self.path.split("?")[0])
            if match := re.fullmatch(r"/datasets/me/numbers/resolve/[^/]+/(.+)", path):
                self.send_file(folder / match[1])
            elif match := re.fullmatch(r"/api/datasets/me/numbers/tree/[^/]+/?(.*)", path):
                self.send_json(self.tree(match[1]))
            elif re.fullmatch(r"/api/datasets/me/numbers(/revision/[^/]+)?", path):
                files = [{"rfilename": str(file.relative_to(folder))} for file in folder.rglob("*.*")]
                self.send_json(
                    {"id": "me/numbers", "sha": COMMIT, "private": False, "siblings": files, "tags": []}
                )
            else:
                self.send_missing("RepoNotFound")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            paths = re.findall(r"paths=([^&]+)", body) or json.loads(body)["paths"]
            entries = [
                self.entry(folder / unquote(path)) for path in paths if (folder / unquote(path)).exists()
            ]
            self.send_json(entries)

        def tree(self, path: str) -> list[dict[str, object]]:
            return [self.entry(file) for file in sorted((folder / path).glob("*"))]

        def entry(self, file: Path) -> dict[str, object]:
            kind, size = ("directory", 0) if file.is_dir() else ("file", file.stat().st_size)
            return {"type": kind, "path": str(file.relative_to(folder)), "size": size, "oid": "b" * 40}

        def send_file(self, file: Path) -> None:
            if not file.is_file():
                return self.send_missing("EntryNotFound")
            content = file.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
            if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                start, stop = int(asked[1]), min(int(asked[2]) + 1, len(content))
                ranges.append(file.name)
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
                return self.reply(206, content[start:stop], headers)
            self.reply(200, content, headers)

        def send_json(self, content: object) -> None:
            self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def send_missing(self, code: str) -> None:
            self.reply(404, b"", {"X-Error-Code": code})

        def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub(tmp_path: Path, numbered_rows: Rows) -> Iterator[tuple[str, list[str]]]:
    """Address of the server; names of the files of which parts were asked for, as they come."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    for shard in range(2):
        numbered_rows(20, 20 * shard).to_parquet(
            folder / f"data/train-0000{shard}-of-00002.parquet", batch_size=5
        )
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: data/train-*\n---\n"
    )
    ranges: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(folder, ranges))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", ranges
    server.shutdown()


def test_dataset_on_the_hub_is_streamed_by_row_group(hub: tuple[str, list[str]], tmp_path: Path):
    address, ranges = hub
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    environment |= {
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", CLIENT, str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        'me/numbers: 40 images (2 parquet files, 8 row groups), column "image", labels "label" (3 classes)',
        "True",
        'me/numbers: no split "dev"; it has: train',
        "cannot open me/nothing: Dataset 'me/nothing' doesn't exist on the Hub or cannot be accessed.",
    ]
    assert len(ranges) >= 8 and set(ranges) == {
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    }
