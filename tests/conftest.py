"""Models for the tests: the tiny world, and random ones of other families with their own chat templates, built on the spot."""
import pytest
import torch
from pathlib import Path

from sampling import load

TINY = Path(__file__).parent.parent / "tiny"


@pytest.fixture(scope="session")
def tiny():
    return load(str(TINY))
