"""Checks of the exercises: on your files, or with --solutions on those in solutions/."""

import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import pytest  # noqa: E402
import torch  # noqa: E402

HERE = Path(__file__).parent
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--solutions", action="store_true", help="check the solutions instead of your own files"
    )


@pytest.fixture(scope="module")
def task(request):
    """The module under test: test_NAME.py checks NAME.py. It is imported by its path, so that both
    versions may have the same name.
    """
    name = request.path.stem.removeprefix("test_")
    folder = HERE / "solutions" if request.config.getoption("--solutions") else HERE
    spec = importlib.util.spec_from_file_location(f"exercise_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
