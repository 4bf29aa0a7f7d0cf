"""Bundles that take a while to export, once per run."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from support import exported


@pytest.fixture(scope="session")
def exported_folder(tmp_path_factory):
    """Where the cases of `support.exported` are: written by another environment, or here."""
    given = os.environ.get("EDGETRAIN_TEST_BUNDLES")
    if given:
        return Path(given)
    if importlib.util.find_spec("torch") is None:
        pytest.skip("without torch, bundles come from another environment: set EDGETRAIN_TEST_BUNDLES")
    folder = tmp_path_factory.mktemp("exported")
    exported.build(folder)
    return folder


@pytest.fixture(params=exported.CASES)
def case(request, exported_folder):
    return exported.read_case(exported_folder, request.param)
