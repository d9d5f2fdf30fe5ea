"""Adapter files on the Hugging Face Hub: found, fetched, uploaded. A Hub that cannot be reached is noticed at once."""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from .errors import CapreseError

DEFAULT_FILE_NAME = "adapters.safetensors"
CONNECT_SECONDS = 3.0
_HUB_FILE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(/(?P<file>[\w./-]+\.safetensors))?")


def names_hub(weights: str) -> bool:
    """Whether the text can be owner/name, or owner/name/file.safetensors, on the Hub."""
    match = _HUB_FILE.fullmatch(weights)
    return match is not None and not match["repo"].endswith(".safetensors")


@cache
def use_cache_if_unreachable() -> None:
    """Have huggingface_hub, and transformers with it, use its cache alone if the Hub does not answer in 3 seconds.

    They would try six times, for half a minute, each with a warning. With a proxy, which may know more, nothing is
    tried.
    """
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies().keys() - {"no"}:
        return
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), CONNECT_SECONDS).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


def fetch(weights: str, choose: Callable[[Path], Path]) -> Path:
    """The adapter file that owner/name or owner/name/file.safetensors names, from the Hub or its cache.

    Of a repository: adapters.safetensors, or its one safetensors file; of a cached one, the file that `choose` finds in
    the directory. CapreseError, in one line, for none.
    """
    match = _HUB_FILE.fullmatch(weights)
    assert match is not None
    use_cache_if_unreachable()
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    repo, file = match["repo"], match["file"]
    try:
        if file is None and constants.HF_HUB_OFFLINE:
            return choose(Path(snapshot_download(repo, allow_patterns="*.safetensors", local_files_only=True)))
        return Path(hf_hub_download(repo, file or _only_file(repo, HfApi().list_repo_files(repo))))
    except CapreseError:
        raise
    except Exception as error:  # of names, repositories, the network, by several libraries
        reason = type(error).__name__
        if constants.HF_HUB_OFFLINE:
            reason = "the Hub cannot be reached, and its cache has no such file"
        raise CapreseError(
            "adapter weights",
            expected="a local path, or a repository of the Hub as owner/name or owner/name/file.safetensors",
            found=f"{weights!r} ({reason})",
            fix="check the path, the Hub id, and the network",
        ) from None


def _only_file(repo: str, names: Sequence[str]) -> str:
    files = [name for name in names if name.endswith(".safetensors")]
    if DEFAULT_FILE_NAME in files or len(files) == 1:
        return DEFAULT_FILE_NAME if DEFAULT_FILE_NAME in files else files[0]
    raise CapreseError(
        f"adapter repository {repo}",
        expected=f"{DEFAULT_FILE_NAME}, or one safetensors file",
        found=", ".join(files) or "none",
        fix=f"name the file, as {repo}/{files[0] if files else DEFAULT_FILE_NAME}",
    )


def check_upload(repo: str) -> None:
    """CapreseError, before the work and not after it, if there is no such name, no token, or no Hub."""
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise CapreseError("--push-to-hub", expected="owner/name", found=repo, fix="correct it")
    use_cache_if_unreachable()
    try:
        HfApi().whoami()
    except Exception as error:  # as in `fetch`
        raise CapreseError(
            "--push-to-hub",
            expected="a Hub that can be reached, and a token for it",
            found=_first_line(error),
            fix="check the network, and log in with `hf auth login` or HF_TOKEN",
        ) from None


def upload(repo: str, files: dict[str, Path | bytes]) -> str:
    """Put the files, by their names there, into the model repository, which is made if need be, in one commit.

    Returns its address. CapreseError if that fails: the files are here.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, repo_type="model", exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        api.create_commit(repo, operations, commit_message="Add a Caprese adapter")
    except Exception as error:  # as in `fetch`
        raise CapreseError(
            f"--push-to-hub {repo}",
            expected="a repository that takes the adapter, which is written here",
            found=_first_line(error),
            fix=f"upload the file yourself: {_command(repo, files)}",
        ) from None
    return str(address)


def _command(repo: str, files: dict[str, Path | bytes]) -> str:
    """What uploads the files of this machine."""
    paths = {name: path for name, path in files.items() if isinstance(path, Path)}
    return " && ".join(shlex.join(["hf", "upload", repo, str(path), name]) for name, path in paths.items())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:150]}"
