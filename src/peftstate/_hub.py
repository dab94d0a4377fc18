"""Asking the Hub, or its cache, for the files of a repo, and saying what is wrong if they are not
to be had."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

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
        from huggingface_hub.errors import HFValidationError, HTTPError

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
        except (HTTPError, OSError) as error:
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


def may_have(name: str, file: str, **hub: Any) -> bool:
    """Whether a repo may have a file: only if the Hub denies it is that certain not to be.

    Args:
        name: The repo's id.
        file: The file.
        **hub: The arguments of `huggingface_hub.hf_hub_download`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, file, **hub)
    except LocalEntryNotFoundError:
        return True
    except EntryNotFoundError:
        return False
    except (HTTPError, OSError, ValueError):
        return True
    return True


def _is_of_the_network(error: BaseException) -> bool:
    """Whether no word of the Hub came through, rather than a refusal or an error of the disk."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return True
    if isinstance(error, HfHubHTTPError):
        return False
    return not isinstance(error, OSError) or error.errno is None
