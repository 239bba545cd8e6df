"""What a name given by a user stands for: a folder, or a repository on the Hub at a revision.

Everything that this package loads by such a name is loaded here, and never with code from a repository.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRETRAINING = "pretraining"  # folder of a published repository that holds the pre-training checkpoint
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Location:
    """A folder, or a repository.

    Attributes:
        name: path of the folder, or `owner/name`.
        revision: branch, tag or commit of a repository; None: of a folder, or the main branch.
    """

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def is_folder(self) -> bool:
        """Whether it is on this machine."""
        return Path(self.name).is_dir()

    def file(self, name: str, subfolder: str = "") -> Path | None:
        """A file as a local path, downloaded where necessary; None where there is none.

        Raises:
            OSError: there is no such repository or revision, or it cannot be reached.
        """
        from transformers.utils.hub import cached_file

        path = cached_file(
            self.name,
            name,
            subfolder=subfolder,
            revision=self.revision,
            _raise_exceptions_for_missing_entries=False,
        )
        return None if path is None else Path(path)

    def subfolder(self) -> str:
        """`pretraining` where there is such a checkpoint, else the root."""
        return PRETRAINING if self.file(CONFIG_FILE, PRETRAINING) is not None else ""

    def pinned(self) -> "Location":
        """The same at the commit that the revision names now; a folder as it is."""
        from transformers.utils.hub import extract_commit_hash

        if self.is_folder:
            return self
        config = self.file(CONFIG_FILE)
        commit = None if config is None else extract_commit_hash(str(config), None)
        return self if commit is None else Location(self.name, commit)

    def load(self, auto_class: Any, subfolder: str = "", **options: Any) -> Any:
        """`from_pretrained` of an Auto class or model class.

        Args:
            auto_class: what loads.
            subfolder: folder inside of it.
            **options: as in transformers.

        Raises:
            ValueError: it needs code from the repository.
            OSError: there is nothing to load.
        """
        options = {"revision": self.revision or "main", "subfolder": subfolder, **options}
        try:
            return auto_class.from_pretrained(self.name, trust_remote_code=False, **options)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ValueError(
                f"'{self}' brings Python code of its own, which hf-ssl never runs; read that code, and if "
                "you trust it, load the model in Python with trust_remote_code=True and hand it to "
                "hf_ssl.evaluation"
            ) from error


def locate(name: str | Path) -> Location:
    """The folder, `owner/name` or `owner/name@revision` that a name stands for; nothing is downloaded.

    Raises:
        ValueError: no such folder, and no name of a repository.
    """
    text = str(name)
    if Path(text).is_dir():
        return Location(text)
    repository, _, revision = text.partition("@")
    if is_local_name(repository) or repository.count("/") != 1:
        raise ValueError(
            f"there is no folder '{text}', and a repository on the Hub is written owner/name or "
            "owner/name@revision"
        )
    return Location(repository, revision or None)


def is_local_name(name: str) -> bool:
    """Whether a text can only be a path: the Hub's names have no such form."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "*" in name
