"""Asking the Hub, or its cache, for the files of a repo, and saying why they are not to be had."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import attrs

from peftstate.errors import AdapterNotFoundError


@attrs.frozen(kw_only=True)
class HubRepo:
    """A repo on the Hub, and how to ask for its files.

    Attributes:
        name: Its id.
        revision: Branch, tag or commit; `None` for the main branch.
        cache_dir: The Hub's cache, when it is not the usual one.
        token: Access token for the Hub.
        local_files_only: Whether to take only what the cache holds.
    """

    name: str
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = attrs.field(default=None, repr=False)
    local_files_only: bool = False

    def download(self, patterns: Collection[str], *, force_download: bool = False) -> Path | None:
        """The folder of the Hub's cache with the files of one commit; `None`: no repo has this id.

        Args:
            patterns: The files to download that the cache does not hold.
            force_download: Whether to download what the cache holds, too.

        Raises:
            HfHubHTTPError: The Hub refused, as it does for a repo that does not exist.
            AdapterNotFoundError: The Hub is not to be reached and the cache lacks files.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        try:
            snapshot = snapshot_download(
                self.name,
                revision=self.revision,
                cache_dir=None if self.cache_dir is None else os.fspath(self.cache_dir),
                token=self.token,
                local_files_only=self.local_files_only,
                force_download=force_download,
                allow_patterns=list(patterns),
            )
        except HFValidationError:
            return None
        except (_http_error(), OSError) as error:
            if _is_of_the_network(error):
                raise AdapterNotFoundError(self._asked_for(), self._why(error)) from error
            raise
        return Path(snapshot)

    def _asked_for(self) -> str:
        """The repo as messages name it."""
        return f"{self.name} at revision {self.revision}" if self.revision else self.name

    def _why(self, error: BaseException) -> str:
        """Why files are not to be had."""
        from huggingface_hub import constants

        if type(error).__name__ == "IncompleteSnapshotError":  # huggingface_hub 2 has it
            kept = "the Hub's cache holds only some of the files of the repo of that name"
        else:
            kept = "the Hub's cache holds no repo of that name"
        if self.local_files_only or constants.HF_HUB_OFFLINE:
            how = "local_files_only=True" if self.local_files_only else "HF_HUB_OFFLINE is set"
            return f"{kept}; the Hub itself was not asked ({how})"
        cause = error.__cause__ or error
        reason = str(cause).partition("\n")[0]
        return f"{kept}, and the Hub cannot be reached ({type(cause).__name__}: {reason})"


def may_have(
    name: str,
    file: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> bool:
    """Whether a repo may have a file: it is certain not to only if the Hub says so, soon.

    Args:
        name: The repo's id.
        file: The file's name.
        subfolder: The folder that it is in.
        revision: Branch, tag or commit.
        token: Access token for the Hub.
        local_files_only: Whether the Hub is not to be asked.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    if local_files_only:
        return True
    try:
        url = hf_hub_url(name, file, subfolder=subfolder, revision=revision)
        get_hf_file_metadata(url, token=token, timeout=_PATIENCE)
    except EntryNotFoundError:
        return False
    except (_http_error(), OSError, ValueError):
        return True
    return True


_PATIENCE = 3.0
"""Seconds to wait for the Hub's word on a file that no load depends on."""


def _http_error() -> type[Exception]:
    """What the HTTP library that huggingface_hub uses raises: httpx, or formerly requests."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base


def _is_of_the_network(error: BaseException) -> bool:
    """Whether no word of the Hub came through, rather than a refusal or an error of the disk."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return True
    if isinstance(error, HfHubHTTPError):
        return False
    return not isinstance(error, OSError) or error.errno is None
