"""The Hub's requests and answers, for the test server (`hub_server.py`).

Made from the requests that huggingface_hub 2, transformers 5 and datasets 5 send; what they do not read in an
answer is left out. Served files are never redirected.
"""

import base64
import hashlib
import json
import re
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from tests.hub_repositories import Commit, Repository, StoredFile, is_lfs, stored
from tests.hub_transport import Answer, LoggingHandler, RefusedError, json_answer

USER = "tester"  # may write to repositories of its own and of its organizations
ORGANIZATIONS = ["lab"]
TOKEN = "hf_write"
READ_TOKEN = "hf_read"  # may read private repositories and change nothing
ROLES = {TOKEN: "write", READ_TOKEN: "read"}

_REPOSITORY = r"(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
_GIT = r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+?)"
ROUTES = [  # method, path, function of the handler
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repository"),
    ("DELETE", r"/api/repos/delete", "delete_repository"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "upload_lfs"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "verify_lfs"),
    ("POST", rf"{_GIT}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("GET", rf"{_GIT}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "send_file"),
    ("POST", rf"/api/{_REPOSITORY}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/{_REPOSITORY}/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", rf"/api/{_REPOSITORY}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("POST", rf"/api/{_REPOSITORY}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("GET", rf"/api/{_REPOSITORY}/refs", "references"),
    ("GET", rf"/api/{_REPOSITORY}/commits/(?P<revision>[^/]+)", "commits"),
    ("POST", rf"/api/{_REPOSITORY}/branch/(?P<branch>[^/]+)", "create_branch"),
    ("DELETE", rf"/api/{_REPOSITORY}/branch/(?P<branch>[^/]+)", "delete_branch"),
    ("POST", rf"/api/{_REPOSITORY}/tag/(?P<revision>[^/]+)", "create_tag"),
    ("DELETE", rf"/api/{_REPOSITORY}/tag/(?P<tag>[^/]+)", "delete_tag"),
    ("PUT", rf"/api/{_REPOSITORY}/settings", "change_settings"),
    ("GET", rf"/api/{_REPOSITORY}(?:/revision/(?P<revision>[^/]+))?", "information"),
]
WRITES = {"POST", "PUT", "DELETE"}
OPEN_TO_READERS = {"validate_yaml", "paths_info", "upload_lfs"}  # the address of an upload is its permission


class HubRequestHandler(LoggingHandler):
    """What the Hub answers."""

    def answer(self, path: str) -> Answer:
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path) if route_method == method else None
            if match:
                if method in WRITES and function not in OPEN_TO_READERS:
                    self._check_may_write()
                values: dict[str, Any] = {
                    key: unquote(value) for key, value in match.groupdict().items() if value
                }
                if "name" in values:
                    values["repository"] = self._repository(values.pop("kind", "models"), values.pop("name"))
                with self.hub.lock:
                    answer: Answer = getattr(self, function)(**values)
                    return answer
        raise RefusedError(404, f"no such page: {self.command} {path}")

    # Who may do what

    @property
    def role(self) -> str | None:
        return ROLES.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _check_may_write(self) -> None:
        if self.role is None:
            raise RefusedError(401, "Invalid username or password.")
        if self.role != "write":
            raise RefusedError(403, "this token has no write permission")

    def _repository(self, kind: str, name: str) -> Repository:
        found: Repository | None = self.hub.repositories.get((kind, name))
        if found is None or (found.private and self.role is None):
            raise RefusedError(401 if self.role is None else 404, "Repository not found", "RepoNotFound")
        if self.command in WRITES and self.role == "write":
            check_namespace(name)
        return found

    # Accounts and repositories

    def whoami(self) -> Answer:
        if self.role is None:
            raise RefusedError(401, "Invalid username or password.")
        token = {"displayName": "token", "role": self.role}
        return json_answer(
            {
                "type": "user",
                "name": USER,
                "fullname": "A Tester",
                "orgs": [{"type": "org", "name": name} for name in ORGANIZATIONS],
                "auth": {"type": "access_token", "accessToken": token},
            }
        )

    def _named_repository(self) -> tuple[dict[str, Any], str, str]:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        check_namespace(name)
        return asked, f"{asked.get('type') or 'model'}s", name

    def create_repository(self) -> Answer:
        asked, kind, name = self._named_repository()
        content = {"url": f"{self.hub.address}/{prefix(kind)}{name}", "name": name, "id": name}
        if (kind, name) in self.hub.repositories:
            raise RefusedError(409, "You already created this repo", **content)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[kind, name] = Repository(kind, name, private)
        return json_answer(content)

    def delete_repository(self) -> Answer:
        _, kind, name = self._named_repository()
        if self.hub.repositories.pop((kind, name), None) is None:
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        return json_answer({})

    def change_settings(self, repository: Repository) -> Answer:
        asked = json.loads(self.body)
        repository.private = asked.get("visibility") == "private" or bool(asked.get("private"))
        return json_answer({})

    def validate_yaml(self) -> Answer:
        errors = card_errors(json.loads(self.body)["content"])
        content: dict[str, Any] = {"errors": [{"message": error} for error in errors], "warnings": []}
        if errors:
            raise RefusedError(400, errors[0], **content)
        return json_answer(content)

    def information(self, repository: Repository, revision: str = "main") -> Answer:
        commit = commit_of(repository, revision)
        card = card_of(commit)
        files: list[dict[str, object]] = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            files = [
                {"rfilename": path} | commit.files[path].entry(path) | {"blobId": commit.files[path].git_oid}
                for path in sorted(commit.files)
            ]
        return json_answer(
            {
                "id": repository.name,
                "modelId": repository.name,
                "author": repository.name.split("/")[0],
                "sha": commit.oid,
                "lastModified": commit.date,
                "private": repository.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": card.get("tags") or [],
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "cardData": card,
                "siblings": files,
            }
        )

    # Revisions

    def references(self, repository: Repository) -> Answer:
        def rows(commits: dict[str, Commit], folder: str) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"{folder}{name}", "targetCommit": commit.oid}
                for name, commit in commits.items()
            ]

        own = {name: commit for name, commit in repository.branches.items() if not name.startswith("refs/")}
        requests = {name: commit for name, commit in repository.branches.items() if name not in own}
        content = {"branches": rows(own, "refs/heads/"), "tags": rows(repository.tags, "refs/tags/")}
        return json_answer(content | {"converts": [], "pullRequests": rows(requests, "")})

    def commits(self, repository: Repository, revision: str) -> Answer:
        return json_answer(
            [
                {
                    "id": commit.oid,
                    "title": commit.title,
                    "message": commit.description,
                    "authors": [{"user": USER}],
                    "date": commit.date,
                }
                for commit in commit_of(repository, revision).history()
            ]
        )

    def create_branch(self, repository: Repository, branch: str) -> Answer:
        start = (json.loads(self.body or b"{}") or {}).get("startingPoint") or "main"
        if branch in repository.branches:
            raise RefusedError(409, f"Reference already exists: {branch}")
        repository.branches[branch] = commit_of(repository, start)
        return json_answer({}, 201)

    def delete_branch(self, repository: Repository, branch: str) -> Answer:
        if repository.branches.pop(branch, None) is None:
            raise RefusedError(404, f"no branch {branch}", "RevisionNotFound")
        return json_answer({})

    def create_tag(self, repository: Repository, revision: str) -> Answer:
        tag = json.loads(self.body)["tag"]
        if tag in repository.tags:
            raise RefusedError(409, f"Tag reference exists already: {tag}")
        repository.tags[tag] = commit_of(repository, revision)
        return json_answer({}, 201)

    def delete_tag(self, repository: Repository, tag: str) -> Answer:
        if repository.tags.pop(tag, None) is None:
            raise RefusedError(404, f"no tag {tag}", "RevisionNotFound")
        return json_answer({})

    # Upload

    def preupload(self, repository: Repository, revision: str) -> Answer:
        present = commit_of(repository, revision).files
        rows: list[dict[str, object]] = []
        for asked in json.loads(self.body)["files"]:
            lfs = is_lfs(base64.b64decode(asked["sample"]), asked["size"]) and asked["size"] > 0
            file = present.get(asked["path"])
            row = {"path": asked["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            rows.append({**row, "oid": file.oid if file else None})
        return json_answer({"files": rows})

    def lfs_batch(self, repository: Repository) -> Answer:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            row = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.uploads:
                address = f"{self.hub.address}/lfs/{asked['oid']}"
                verify = {"href": f"{address}/verify", "header": {}}
                row["actions"] = {"upload": {"href": address, "header": {}}, "verify": verify}
            objects.append(row)
        return json_answer({"transfer": "basic", "objects": objects})

    def upload_lfs(self, oid: str) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, "the content is not what its SHA-256 says")
        self.hub.uploads[oid] = self.body
        return json_answer({})

    def verify_lfs(self, oid: str) -> Answer:
        if len(self.hub.uploads.get(oid, b"")) != json.loads(self.body)["size"]:
            raise RefusedError(404, "no such upload")
        return json_answer({})

    def commit(self, repository: Repository, revision: str) -> Answer:
        """All or nothing: what is wrong is found before anything changes."""
        lines = [json.loads(line) for line in self.body.decode().splitlines() if line]
        header = lines[0]["value"]
        head = commit_of(repository, revision)
        if header.get("parentCommit") not in (None, head.oid):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            self._apply(line["key"], line["value"], files)
        branch = revision
        if self.query.get("create_pr") == "1":
            branch = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repository.branches)}"
            repository.branches[branch] = head
        commit = repository.add_commit(branch, files, header["summary"], header.get("description") or "")
        page = f"{self.hub.address}/{prefix(repository.kind)}{repository.name}"
        content = {"success": True, "commitOid": commit.oid, "commitUrl": f"{page}/commit/{commit.oid}"}
        if branch != revision:
            content["pullRequestUrl"] = f"{page}/discussions/{branch.rpartition('/')[2]}"
        return json_answer(content | {"hookOutput": ""})

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, StoredFile]) -> None:
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"])
            if is_lfs(content[:512], len(content)):
                raise RefusedError(400, f"{path} is binary or large; upload it by LFS")
            files[path] = StoredFile(content, is_lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.uploads:
                raise RefusedError(400, f"{path} was not uploaded")
            files[path] = StoredFile(self.hub.uploads[value["oid"]], is_lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise RefusedError(404, f"no file {path} to delete", "EntryNotFound")
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
                del files[name]
        else:
            raise RefusedError(400, f"unknown operation {key}")

    # Download

    def tree(self, repository: Repository, revision: str, path: str = "") -> Answer:
        commit = commit_of(repository, revision)
        entries = commit.listing(path.strip("/"), self.query.get("recursive", "").lower() == "true")
        if path and not entries:
            raise RefusedError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        start = int(self.query.get("cursor", 0))
        stop = start + self.hub.page_size
        status, body, headers = json_answer(entries[start:stop])
        if stop < len(entries):
            query = "&".join(f"{key}={quote(value)}" for key, value in self.query.items() if key != "cursor")
            address = f"{self.hub.address}{urlsplit(self.path).path}?{query}&cursor={stop}"
            headers = {**headers, "Link": f'<{address}>; rel="next"'}
        return status, body, headers

    def paths_info(self, repository: Repository, revision: str) -> Answer:
        commit = commit_of(repository, revision)
        is_json = "json" in self.headers.get("Content-Type", "")
        asked = json.loads(self.body) if is_json else parse_qs(self.body.decode())
        wanted = {path.strip("/") for path in asked["paths"]}
        return json_answer([row for row in commit.listing("", recursive=True) if row["path"] in wanted])

    def send_file(self, repository: Repository, revision: str, path: str) -> Answer:
        commit = commit_of(repository, revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        file = commit.files.get(path)
        if file is None:
            message = f"{path} does not exist on {revision}"
            missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": message}
            return 404, message.encode(), headers | missing
        headers["ETag"] = f'"{file.oid}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        size = len(file.content)
        if not asked:
            return 200, file.content, headers
        start, stop = int(asked[1]), min(int(asked[2] or size) + 1, size)
        if start >= size:
            return 416, b"", headers | {"Content-Range": f"bytes */{size}"}
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return 206, file.content[start:stop], headers


def prefix(kind: str) -> str:
    """Of the pages of a kind of repository."""
    return "" if kind == "models" else f"{kind}/"


def check_namespace(name: str) -> None:
    if name.split("/")[0] not in (USER, *ORGANIZATIONS):
        raise RefusedError(403, f"you have no write access to {name}")


def commit_of(repository: Repository, revision: str) -> Commit:
    commit = repository.commit_at(revision)
    if commit is None:
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


def card_of(commit: Commit) -> dict[str, Any]:
    """Metadata of the README, if it has any that can be read."""
    text = commit.files.get("README.md", stored(b"")).content.decode(errors="replace")
    return {} if card_errors(text) else _front_matter(text) or {}


def card_errors(text: str) -> list[str]:
    """What is wrong with the metadata of a README."""
    try:
        metadata = _front_matter(text)
    except yaml.YAMLError as error:
        return [f"invalid YAML: {' '.join(str(error).split())}"]
    return [] if isinstance(metadata, (dict, type(None))) else ["the metadata must be a mapping"]


def _front_matter(text: str) -> Any:
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None
