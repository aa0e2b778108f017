"""Runs that tests of this folder share: to look at and to copy, not to change."""
import pytest

from tests.runs import Place, Stopped, begin, stopping


@pytest.fixture(scope="session")
def place(tiny_gguf, tmp_path_factory):
    """The tiny model with data: see runs.Place."""
    return Place(tmp_path_factory.mktemp("place"), tiny_gguf)


@pytest.fixture(scope="session")
def whole(place):
    """An uninterrupted run of LoRA."""
    begin(place.lora, place.folder / "whole")
    return place.folder / "whole"


@pytest.fixture(scope="session")
def half(place):
    """The same run, stopped after step 4 of 6."""
    with stopping(4), pytest.raises(Stopped):
        begin(place.lora, place.folder / "half")
    return place.folder / "half"
