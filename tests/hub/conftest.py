"""A Hub on loopback, and a cache of its own, for one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import transformers.utils.hub
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

from tests.hub.stub import Hub, serving

_FORGET_CLIENT: Callable[[], None] = getattr(_http, "reset_sessions", None) or _http.close_session
"""The Hub library keeps its HTTP client, which may be one that refuses to go online."""


@attrs.frozen
class Client:
    """What the Hub library in this process is set to.

    Attributes:
        cache: The folder of its cache.
    """

    cache: Path
    _monkeypatch: pytest.MonkeyPatch

    def point_at(self, endpoint: str) -> None:
        """Have all requests go to an address."""
        url = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in (("ENDPOINT", endpoint), ("HUGGINGFACE_CO_URL_TEMPLATE", url)):
            self._monkeypatch.setattr(constants, name, value)
            if hasattr(file_download, name):  # huggingface_hub 0
                self._monkeypatch.setattr(file_download, name, value)
        for api in _apis():
            self._monkeypatch.setattr(api, "endpoint", endpoint)
        self.go(online=True)

    def go(self, *, online: bool) -> None:
        """Be online, or as with HF_HUB_OFFLINE set."""
        self._monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not online)
        self._monkeypatch.setenv("HF_HUB_OFFLINE", str(int(not online)))  # which PEFT looks at
        # transformers 4 reads the setting once.
        self._monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", not online, False)
        _FORGET_CLIENT()

    def lose_network(self) -> None:
        """Have every request fail to connect."""
        self.point_at("http://127.0.0.1:9")


def _apis() -> Iterator[Any]:
    """The objects that took the address of the Hub when they were made."""
    yield hf_api.api
    if hasattr(transformers.utils.hub, "hf_api"):  # of transformers 5
        yield transformers.utils.hub.hf_api()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub without repos."""
    with serving() as found:
        yield found


@pytest.fixture
def client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """The Hub library, set to that Hub and an empty cache."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    if hasattr(transformers.utils.hub, "TRANSFORMERS_CACHE"):  # of transformers 4
        monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    found = Client(tmp_path / "cache", monkeypatch)
    found.point_at(hub.endpoint)
    disable_progress_bars()
    yield found
    enable_progress_bars()
    monkeypatch.undo()
    _FORGET_CLIENT()


@pytest.fixture(params=["links", "copies"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the cache holds files: as links to blobs, or as on Windows, where none can be made."""
    if request.param == "copies":
        monkeypatch.setattr(file_download, "are_symlinks_supported", lambda *_, **__: False)
    layout: str = request.param
    return layout
