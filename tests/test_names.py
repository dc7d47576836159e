"""The end of an error about an unknown name."""

from fastcov.names import closest


def test_at_most_three_names_the_most_alike_first() -> None:
    known = ["layer1.conv2", "layer1.conv1", "layer1.conv3", "layer1.conv4", "head"]
    said = closest("layer1.conv1x", known)
    assert said.startswith("; closest names: layer1.conv1, ")
    assert said.count(",") == 2
    assert "head" not in said


def test_nothing_alike_says_nothing() -> None:
    assert closest("zzzz", ["conv1", "head"]) == ""
    assert closest("conv1", []) == ""
