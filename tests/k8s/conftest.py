"""Every overlay, built once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.k8s.building import KUBECTL, OVERLAYS, Document, build


@pytest.fixture(scope="session")
def overlays() -> dict[str, list[Document]]:
    """Folder below k8s/ → its manifests."""
    if KUBECTL is None:
        pytest.skip("no kubectl here: the overlays are not built")
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(OVERLAYS, pool.map(build, OVERLAYS), strict=True))
