"""The Hub server of the tests: huggingface_hub, transformers and datasets run against it unchanged."""

import re
from pathlib import Path

import datasets
import httpx2
import pytest
import torch
from huggingface_hub import HfApi, HfFileSystem, ModelCard, hf_hub_download, metadata_load, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from transformers import AutoModel, ViTConfig, ViTModel

from tests.clean_process import run_python
from tests.hub_protocol import READ_TOKEN
from tests.hub_server import HubServer

CARD = "---\nlicense: apache-2.0\ntags: [tiny]\n---\nA card.\n"


def tiny_vit(seed: int = 0) -> ViTModel:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    return ViTModel(config, add_pooling_layer=False)


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.txt").write_text(content)
    return folder


def test_a_pushed_model_comes_back_and_an_earlier_revision_stays(hub: HubServer):
    first, second = tiny_vit(0), tiny_vit(1)
    commit = first.push_to_hub("tester/vit")
    second.push_to_hub("tester/vit")
    assert same_weights(second, AutoModel.from_pretrained("tester/vit", add_pooling_layer=False))
    pinned = AutoModel.from_pretrained("tester/vit", revision=commit.oid, add_pooling_layer=False)
    assert same_weights(first, pinned)
    assert set(hub.files("models", "tester/vit")) == {"README.md", "config.json", "model.safetensors"}
    (upload, _) = hub.asked(r"^PUT /lfs/")
    assert "authorization" not in upload.headers and upload.status == 200


def test_a_push_of_what_is_there_already_adds_no_commit(hub: HubServer, tmp_path: Path):
    folder = write(tmp_path / "folder", a="one")
    HfApi().create_repo("tester/notes")
    for _ in range(2):
        HfApi().upload_folder(repo_id="tester/notes", folder_path=folder)
    assert [commit.title for commit in HfApi().list_repo_commits("tester/notes")] == [
        "Upload folder using huggingface_hub",
        "initial commit",
    ]


def test_upload_folder_deletes_what_the_patterns_say_in_the_same_commit(hub: HubServer, tmp_path: Path):
    hub.commit("models", "tester/notes", {"old.txt": "1", "keep.md": "2", "sub/old.txt": "3"})
    HfApi().upload_folder(
        repo_id="tester/notes", folder_path=write(tmp_path / "folder", new="4"), delete_patterns="*.txt"
    )
    assert hub.files("models", "tester/notes") == {"keep.md": b"2", "new.txt": b"4"}
    assert len(hub.asked("POST .*/commit/")) == 1


def test_snapshots_hold_every_file_of_their_revision(hub: HubServer):
    files = {f"part-{number}.bin": b"\0" * number for number in range(1, 8)} | {"README.md": CARD}
    commit = hub.commit("models", "tester/parts", files)
    hub.commit("models", "tester/parts", {"part-1.bin": None})
    hub.page_size = 3  # the listing comes in pages
    for revision, expected in ((commit, set(files)), ("main", set(files) - {"part-1.bin"})):
        folder = Path(snapshot_download("tester/parts", revision=revision))
        assert {path.name for path in folder.iterdir()} == expected | {".gitattributes"}
    assert len(hub.asked(r"GET .*/tree/.*cursor=3")) == 2
    card = ModelCard.load("tester/parts")
    assert (card.data.license, HfApi().model_info("tester/parts").tags) == ("apache-2.0", ["tiny"])


def test_branches_and_tags(hub: HubServer, tmp_path: Path):
    api = HfApi()
    first = hub.commit("models", "tester/notes", {"a.txt": "1"})
    api.create_tag("tester/notes", tag="v1")
    api.create_branch("tester/notes", branch="draft")
    hub.commit("models", "tester/notes", {"a.txt": "2"})
    api.upload_file(path_or_fileobj=b"3", path_in_repo="a.txt", repo_id="tester/notes", revision="draft")
    contents = [
        Path(hf_hub_download("tester/notes", "a.txt", revision=revision)).read_text()
        for revision in ("v1", "main", "draft", first)
    ]
    assert contents == ["1", "2", "3", "1"]
    references = api.list_repo_refs("tester/notes")
    assert [branch.name for branch in references.branches] == ["main", "draft"]
    assert [(tag.name, tag.target_commit) for tag in references.tags] == [("v1", first)]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch("tester/notes", branch="draft")
    api.delete_branch("tester/notes", branch="draft")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("tester/notes", revision="draft")


def test_a_pull_request_leaves_main_alone(hub: HubServer):
    hub.commit("models", "tester/notes", {"a.txt": "1"})
    commit = HfApi().upload_file(
        path_or_fileobj=b"2", path_in_repo="a.txt", repo_id="tester/notes", create_pr=True
    )
    assert commit.pr_num == 1
    assert hub.files("models", "tester/notes") == {"a.txt": b"1"}
    assert hub.files("models", "tester/notes", "refs/pr/1") == {"a.txt": b"2"}


def test_a_commit_on_another_parent_changes_nothing(hub: HubServer):
    old = hub.commit("models", "tester/notes", {"a.txt": "1"})
    hub.commit("models", "tester/notes", {"a.txt": "2"})
    with pytest.raises(HfHubHTTPError, match="412"):
        HfApi().upload_file(
            path_or_fileobj=b"3", path_in_repo="b.txt", repo_id="tester/notes", parent_commit=old
        )
    assert hub.files("models", "tester/notes") == {"a.txt": b"2"}


def test_repositories_are_created_once_and_deleted(hub: HubServer):
    api = HfApi()
    assert api.create_repo("vit").repo_id == "tester/vit"
    api.create_repo("tester/vit", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("tester/vit")
    api.delete_repo("tester/vit")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("tester/vit")


def test_who_may_do_what(hub: HubServer):
    api, reader, stranger = HfApi(), HfApi(token=READ_TOKEN), HfApi(token=False)
    api.create_repo("tester/secret", private=True)
    api.create_repo("lab/shared")
    assert api.whoami()["name"] == "tester"
    assert reader.model_info("tester/secret").private
    for refused in (
        lambda: stranger.model_info("tester/secret"),
        lambda: stranger.create_repo("tester/other"),
        lambda: reader.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="lab/shared"),
        lambda: api.create_repo("somebody/other"),
        lambda: stranger.whoami(),
    ):
        with pytest.raises(Exception, match="40[13]|oken"):
            refused()
    assert set(hub.repositories) == {("models", "tester/secret"), ("models", "lab/shared")}


def test_a_card_with_broken_metadata_is_refused(hub: HubServer):
    HfApi().create_repo("tester/vit")
    for content in ("---\n- a list\n---\n", "---\na: [\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata in README.md"):
            HfApi().upload_file(
                path_or_fileobj=content.encode(), path_in_repo="README.md", repo_id="tester/vit"
            )
    assert hub.files("models", "tester/vit") == {}


def test_what_is_missing_is_said_as_the_hub_says_it(hub: HubServer):
    hub.commit("models", "tester/notes", {"a.txt": "1"})
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("tester/notes", "b.txt")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("tester/notes", "a.txt", revision="v9")
    with pytest.raises(OSError, match="not a valid model identifier"):
        AutoModel.from_pretrained("tester/nothing")


def numbered_images(count: int) -> datasets.Dataset:
    images = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(count)]
    return datasets.Dataset.from_dict(
        {"image": images}, features=datasets.Features({"image": datasets.Image()})
    )


def test_a_pushed_dataset_is_streamed_and_downloaded(hub: HubServer):
    numbered_images(20).push_to_hub("tester/numbers", num_shards=2)
    assert sorted(hub.files("datasets", "tester/numbers")) == [
        "README.md",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
    ]
    for streaming in (True, False):
        rows = datasets.load_dataset("tester/numbers", split="train", streaming=streaming)
        assert [row["image"].getpixel((0, 0))[0] for row in rows] == list(range(20))
    card = metadata_load(hf_hub_download("tester/numbers", "README.md", repo_type="dataset"))
    assert card["dataset_info"]["splits"][0]["num_examples"] == 20


def test_the_file_system_lists_and_reads_ranges(hub: HubServer):
    hub.commit("datasets", "tester/numbers", {"data/a.bin": bytes(range(256)), "b.txt": "text"})
    files = HfFileSystem()
    assert files.ls("datasets/tester/numbers", detail=False) == [
        "datasets/tester/numbers/.gitattributes",
        "datasets/tester/numbers/b.txt",
        "datasets/tester/numbers/data",
    ]
    assert files.glob("datasets/tester/numbers/**/*.bin") == ["datasets/tester/numbers/data/a.bin"]
    with files.open("datasets/tester/numbers/data/a.bin", block_size=16) as file:
        file.seek(100)
        assert file.read(3) == bytes([100, 101, 102])
    (request,) = hub.asked("GET .*/resolve/.*/a.bin")
    assert re.fullmatch(r"bytes=100-\d+", request.headers["range"]) and request.status == 206


def test_a_process_without_the_package_finds_the_hub_by_its_environment(hub: HubServer):
    hub.commit("models", "tester/notes", {"a.txt": "1"})
    code = """
import sys, importlib.util
from huggingface_hub import hf_hub_download
print(open(hf_hub_download("tester/notes", "a.txt")).read(), sys.argv[1], sys.modules["hf_ssl"])
"""
    assert run_python(code, "x", with_package=False).stdout == "1 x None\n"


# What tests make go wrong


def get(hub: HubServer, **options: float) -> httpx2.Response:
    return httpx2.get(f"{hub.address}/tester/notes/resolve/main/a.txt", **options)


def test_faults_hit_the_requests_they_name_and_no_more(hub: HubServer):
    hub.commit("models", "tester/notes", {"a.txt": "text"})
    hub.fail("GET .*/a.txt", status=429, retry_after=7, skip=1, times=2)
    answers = [get(hub) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 429, 429, 200]
    assert answers[1].headers["Retry-After"] == "7"
    assert [request.status for request in hub.asked("a.txt")] == [200, 429, 429, 200]


def test_connections_are_cut_before_and_within_an_answer(hub: HubServer):
    hub.commit("models", "tester/notes", {"a.txt": "text" * 1000})
    hub.fail("a.txt", cut_after=0)
    hub.fail("a.txt", cut_after=100)
    for _ in range(2):
        with pytest.raises(httpx2.RemoteProtocolError):
            get(hub)
    assert [(request.status, request.sent) for request in hub.asked("a.txt")] == [(None, 0), (200, 100)]
    assert get(hub).text == "text" * 1000


def test_slow_answers_run_into_the_timeout_of_the_client(hub: HubServer):
    hub.commit("models", "tester/notes", {"a.txt": "text"})
    hub.fail("a.txt", delay=0.5)
    hub.fail("a.txt", bytes_per_second=10, skip=1)
    with pytest.raises(httpx2.ReadTimeout):
        get(hub, timeout=0.1)
    get(hub)
    answer = get(hub)
    assert answer.text == "text" and answer.elapsed.total_seconds() > 0.3


def test_a_server_that_stopped_comes_back_at_its_address(hub: HubServer):
    hub.commit("models", "tester/notes", {"a.txt": "text"})
    with httpx2.Client() as client:  # keeps its connection
        address = f"{hub.address}/tester/notes/resolve/main/a.txt"
        assert client.get(address).text == "text"
        hub.stop()
        with pytest.raises(httpx2.TransportError):
            client.get(address)
        hub.start()
        assert client.get(address).text == "text"


def test_a_failed_upload_can_be_repeated(hub: HubServer):
    HfApi().create_repo("tester/vit")
    hub.fail("POST .*/commit/main", status=500)

    def upload() -> None:
        HfApi().upload_file(path_or_fileobj=b"\0weights", path_in_repo="a.bin", repo_id="tester/vit")

    with pytest.raises(HfHubHTTPError, match="500"):
        upload()
    assert hub.files("models", "tester/vit") == {}
    upload()
    assert hub.files("models", "tester/vit") == {"a.bin": b"\0weights"}
    assert [request.status for request in hub.asked("POST .*/commit/")] == [500, 200]
