"""Classes as people name them."""

import pytest

from biggan.classes import UnknownClassError, nearest_class

DIGITS = [f"digit {i}" for i in range(10)]
ANIMALS = [
    "tench, Tinca tinca",
    "great white shark, white shark, man-eater",
    "polar bear",
    "brown bear",
    "bird of paradise",
    "tabby, tabby cat",
    "日本猫",
]


@pytest.mark.parametrize(
    "prompt,names,wanted",
    [
        ("digit 3", DIGITS, 3),
        ("A nice DIGIT 7, please!", DIGITS, 7),
        ("7", DIGITS, 7),
        ("a 3", DIGITS, 3),
        ("the number nine", DIGITS, 9),
        ("digit three", DIGITS, 3),
        ("digit 33", DIGITS, 3),
        ("digti 4", DIGITS, 4),
        ("a photo of a tench", ANIMALS, 0),
        ("Tinca tinca", ANIMALS, 0),
        ("man-eater", ANIMALS, 1),
        ("a white shark", ANIMALS, 1),
        ("a polar bear on the ice", ANIMALS, 2),
        ("paradise", ANIMALS, 4),
        ("a cat", ANIMALS, 5),
        ("tabbi", ANIMALS, 5),
        ("日本猫", ANIMALS, 6),
        ("2", ["2", "7"], 0),  # A name counts before an id.
    ],
)
def test_a_prompt_names_the_class_nearest_to_it(prompt, names, wanted):
    assert nearest_class(prompt, names) == wanted


@pytest.mark.parametrize(
    "prompt,names,said",
    [
        ("digit", DIGITS, "did you mean 'digit 0' or 'digit 1' or 'digit 2'"),
        ("an image of the", ANIMALS, "no class is named"),
        ("12", DIGITS, "class 12 does not exist: ids go from 0 to 9"),
        ("a bicycle", DIGITS, "no class is named 'a bicycle'"),
        ("  ", DIGITS, "no class is named"),
    ],
)
def test_where_none_is_nearest_it_is_said(prompt, names, said):
    with pytest.raises(UnknownClassError, match=said):
        nearest_class(prompt, names)
