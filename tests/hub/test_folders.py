"""A folder appears whole or not at all, also after a process was killed while writing it."""

import pytest

from hf_ssl.hub.folders import refuse_foreign_folder, write_whole_folder


def write_new(folder):
    (folder / "weights").write_text("new")


def write_half(folder):
    write_new(folder)
    raise RuntimeError("disk full")


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        write_whole_folder(tmp_path / "a" / "export", write_half)
    assert list((tmp_path / "a").iterdir()) == []


def test_a_write_replaces_the_whole_folder(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "stale").touch()
    write_whole_folder(tmp_path / "export", write_new)
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "weights"]


def test_what_a_killed_process_left_is_repaired(tmp_path):
    """Killed between the two renames: the earlier folder is moved away, the new one not yet in place."""
    for name, content in ((".export.old", "old"), (".export.partial", "half")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(content)
    with pytest.raises(RuntimeError):
        write_whole_folder(tmp_path / "export", write_half)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (tmp_path / "export" / "weights").read_text() == "old"


def test_a_file_of_the_same_name_is_refused(tmp_path):
    (tmp_path / "export").touch()
    with pytest.raises(FileExistsError, match="is a file; give a folder"):
        refuse_foreign_folder(tmp_path / "export", ["weights"], "weights", overwrite=True)


def test_a_folder_without_the_marker_is_foreign_even_if_its_names_are_ours(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(FileExistsError, match="no earlier export"):
        refuse_foreign_folder(tmp_path, ["config.json", "marker"], "marker", overwrite=False)
