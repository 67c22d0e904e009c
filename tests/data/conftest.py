"""Fixtures of the tests of data."""

import pytest

from tests.support.tiny_vqa import build_processor, opt_config, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny BLIP-2 with its processor."""
    return save_model(tmp_path_factory.mktemp("model"), opt_config())


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of its processor alone."""
    folder = tmp_path_factory.mktemp("processor")
    build_processor().save_pretrained(folder)
    return str(folder)
