"""The README's figure: it is the one that the command draws, and it says of each method what the code does."""
import copy
import xml.etree.ElementTree as ElementTree

import pytest
import torch

import adapter
from methods import METHODS
from tests.toy import attach, toy_model
from tools import draw

SVG = "{http://www.w3.org/2000/svg}"


def panel(method):
    """The element of one method in the figure that is in the repository."""
    return ElementTree.parse(draw.FILE).find(f"{SVG}g[@id='{method}']")


def in_the_code(method):
    """{tensor: its classes} of one value projection: its own and those that its method shares."""
    model, found = attach(toy_model(), method), {}
    trained = adapter.trainable(model)
    for name in model.state_dict():
        place, _, tensor = name.rpartition(".")
        if place == "model.layers.0.self_attn.v_proj" or place.startswith(("cora.", "lotr.")):
            found[tensor] = ["trained" if name in trained else "frozen"] + ["shared"] * (not place.startswith("model."))
    return found


def test_the_figure_is_the_one_that_the_command_draws(tmp_path, monkeypatch, capsys):
    """It is not of an earlier day (else: python -m tools.draw), and it has a panel for every method."""
    drawn = draw.FILE.read_text(encoding="utf-8")
    monkeypatch.setattr(draw, "FILE", tmp_path / "methods.svg")
    draw.main([])
    assert draw.FILE.read_text(encoding="utf-8") == drawn and str(draw.FILE) in capsys.readouterr().out
    assert [group.get("id") for group in ElementTree.fromstring(drawn).findall(f"{SVG}g[@id]")] == list(draw.PANELS)
    assert set(draw.PANELS) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_boxes_are_what_attach_leaves(method):
    """Colour and outline follow requires_grad and sharing; what is not drawn are frozen copies of a start."""
    code, drawn = in_the_code(method), {}
    for box in panel(method).findall(f"{SVG}g[@data-tensors]"):
        drawn |= {tensor: box.get("class").split() for tensor in box.get("data-tensors").split()}
    assert drawn == {tensor: code[tensor] for tensor in drawn}
    assert all(tensor.endswith("0") and code[tensor] == ["frozen"] for tensor in code.keys() - drawn.keys())


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_the_default_model(method, real_base, monkeypatch):
    """At each method's default size. Zeros stand for singular vectors, which take time and change no count."""
    monkeypatch.setattr(adapter, "principal_triplets", lambda weight, rank, svd="gram": (
        torch.zeros(weight.shape[0], rank), torch.zeros(rank), torch.zeros(rank, weight.shape[1])))
    model = copy.deepcopy(real_base.model)
    METHODS[method].attach(model)
    count = sum(parameter.numel() for parameter in adapter.trainable(model).values())
    assert count == draw.PANELS[method].parameters
    assert f"{count:,} parameters train" in "".join(panel(method).itertext())
