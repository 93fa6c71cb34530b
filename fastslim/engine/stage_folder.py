"""The folder of a command after training: what it was begun with, and what came of it."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastslim.engine.options import Options, differences
from fastslim.engine.run_folder import remove_left_overs
from fastslim.errors import FastslimFileError, FastslimValueError
from fastslim.files import write_atomically

Some = TypeVar("Some", bound=Options)


class StageFolder:
    """Rules for entering a folder that was used before; one JSON file tells how.

    Args:
        path: the folder.
        file: the JSON file in it.
        what: is made there, for messages: "search".
        named_by: the flag that chooses another folder; None where there is none.
    """

    def __init__(self, path: Path, file: str, what: str, named_by: str | None = None) -> None:
        self.path, self.what = path, what
        self.results = path / file
        other = f"choose another {named_by}, or replace it" if named_by else "replace it"
        self.advice = f"{other} with --overwrite"

    def saved_options(self, kind: type[Some]) -> Some | None:
        """The options that it was begun with, or None."""
        saved = self.read()
        return None if saved is None else kind.from_mapping(saved["options"], str(self.results))

    def read(self) -> dict[str, Any] | None:
        """The JSON file, or None where there is none.

        Raises:
            FastslimFileError: it is damaged.
        """
        if not self.results.is_file():
            return None
        try:
            saved = json.loads(self.results.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FastslimFileError(f"{self.results} is damaged ({error}): {self.advice}") from error
        if not isinstance(saved, dict) or not {"finished", "options", "made_of"} <= set(saved):
            raise FastslimFileError(f"{self.results} is not of fastslim's: {self.advice}")
        return saved

    def finished(
        self, options: Options, made_of: dict[str, Any], *, resume: bool, overwrite: bool, again: bool = False
    ) -> dict[str, Any] | None:
        """Finds that all is done, or that it may begin or go on; nothing is written.

        Args:
            options: of the command.
            made_of: what the result depends on besides them, such as the supernet's digest.
            resume: go on with what is there.
            overwrite: begin anew, whatever is there.
            again: what is unfinished is simply begun again.

        Returns:
            The results, where they are finished; else None.

        Raises:
            FastslimValueError: something with other options is in the folder, or it is unfinished.
            FastslimFileError: something foreign or damaged is.
        """
        if resume and overwrite:
            raise FastslimValueError(f"--resume goes on with a {self.what}, --overwrite starts it anew: choose one")
        saved = None if overwrite else self.read()
        if saved is None:
            if not overwrite and self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise FastslimFileError(
                    f"{self.path} exists already and holds no {self.what} to go on with: {self.advice}"
                )
        else:
            changed = differences(type(options).from_mapping(saved["options"], str(self.results)), options)
            if not changed and saved["made_of"] != json.loads(json.dumps(made_of)):
                changed = ["the supernet or the subnets have changed since"]
            if changed:
                raise FastslimValueError(
                    f"{self.path} holds a {self.what} with other options ({'; '.join(changed[:3])}): {self.advice}"
                )
            if saved["finished"]:
                return saved
            if not (resume or again):
                raise FastslimValueError(
                    f"{self.path} holds an unfinished {self.what}: continue it with --resume, or {self.advice}"
                )
        return None

    def begin(self, options: Options, made_of: dict[str, Any]) -> None:
        """Makes the folder, and writes down what is begun.

        Raises:
            FastslimFileError: the folder cannot be used.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            remove_left_overs(self.path)
        except OSError as error:
            raise FastslimFileError(f"{self.path} cannot be written to ({error.strerror or error})") from error
        self.write(options, made_of, finished=False)

    def write(self, options: Options, made_of: dict[str, Any], *, finished: bool, **results: Any) -> None:
        """Replaces the JSON file."""
        content = {"finished": finished, **results, "options": options.as_dict(), "made_of": made_of, **origin()}
        write_atomically(self.results, json.dumps(content, indent=1) + "\n")


def origin() -> dict[str, Any]:
    """Where numbers come from: versions and machine."""
    return {
        "versions": {"fastslim": installed_version(), "torch": torch.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def installed_version() -> str:
    """The version of fastslim; a build in place has none."""
    try:
        return metadata.version("fastslim")
    except metadata.PackageNotFoundError:
        return "not installed"


def digest_of(file: Path) -> str:
    """A file's content in 32 hexadecimal digits.

    Raises:
        FastslimFileError: there is no such file.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    except OSError as error:
        raise FastslimFileError(f"there is no checkpoint {file}: train the supernet first") from error
    return digest.hexdigest()
