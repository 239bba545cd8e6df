"""What a Hub stores, in memory: repositories with branches and tags, whose commits are `{path: file}`."""

import hashlib
import itertools
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import cached_property

KINDS = ("models", "datasets", "spaces")
LFS_THRESHOLD = 1 << 20  # bytes; binary files of any size are LFS files too
GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"  # every new repository has it

_numbers = itertools.count(1)


@dataclass(frozen=True)
class StoredFile:
    """One version of a file; two with the same content have the same ids."""

    content: bytes
    is_lfs: bool

    @cached_property
    def git_oid(self) -> str:
        """Hash that git gives the content."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @cached_property
    def oid(self) -> str:
        """What the Hub calls the content by: SHA-256 of an LFS file, git's hash of any other."""
        return hashlib.sha256(self.content).hexdigest() if self.is_lfs else self.git_oid

    def entry(self, path: str) -> dict[str, object]:
        """A row of a listing."""
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(self.content)}
        entry["oid"] = self.git_oid
        if self.is_lfs:
            entry["lfs"] = {"oid": self.oid, "size": len(self.content), "pointerSize": 134}
        return entry


def stored(content: bytes) -> StoredFile:
    """A file of which the Hub decides, as for an upload, whether it is an LFS file."""
    return StoredFile(content, is_lfs(content[:512], len(content)))


def is_lfs(sample: bytes, size: int) -> bool:
    """Whether a file is stored by LFS, from its first bytes and its size."""
    return size > LFS_THRESHOLD or b"\0" in sample


@dataclass(frozen=True)
class Commit:
    """All files of a repository at one moment."""

    files: dict[str, StoredFile]
    title: str
    description: str = ""
    parent: "Commit | None" = None
    number: int = field(default_factory=lambda: next(_numbers))

    @cached_property
    def oid(self) -> str:
        """40 hexadecimal digits; no two commits share one, not even equal ones."""
        return hashlib.sha1(f"{self.number} {self.title}".encode()).hexdigest()

    @property
    def date(self) -> str:
        """Later for later commits."""
        moment = datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(minutes=self.number)
        return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")

    def history(self) -> list["Commit"]:
        """This commit and all before it, latest first."""
        return [self, *self.parent.history()] if self.parent else [self]

    def listing(self, folder: str, recursive: bool) -> list[dict[str, object]]:
        """Files and folders below a folder ("" is the root); empty if there is no such folder."""
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, object]] = {}
        for path, file in self.files.items():
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(name.encode()).hexdigest()
                entries[name] = {"type": "directory", "path": name, "size": 0, "oid": oid}
            if recursive or len(parts) == 1:
                entries[path] = file.entry(path)
        return [entries[name] for name in sorted(entries)]


@dataclass
class Repository:
    """One repository of any kind.

    Attributes:
        kind: models, datasets or spaces.
        name: owner/name.
        private: only read with a token.
        branches: latest commit by name; a pull request is the branch refs/pr/N.
        tags: commit by name.
    """

    kind: str
    name: str
    private: bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches.setdefault("main", Commit({".gitattributes": stored(GIT_ATTRIBUTES)}, "initial commit"))

    def commit_at(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or a commit's id names."""
        named = {**self.tags, **self.branches}.get(revision.removeprefix("refs/heads/"))
        history = (commit for head in {**self.tags, **self.branches}.values() for commit in head.history())
        return named or next((commit for commit in history if commit.oid == revision), None)

    def add_commit(
        self, branch: str, files: dict[str, StoredFile], title: str, description: str = ""
    ) -> Commit:
        """Makes `files` all there is on a branch; the branch is new if there is none of this name."""
        commit = Commit(dict(files), title, description, self.branches.get(branch))
        self.branches[branch] = commit
        return commit
