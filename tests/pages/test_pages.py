"""What the scripts that fill pages share."""

import pytest

from pages import bullets, replace_parts, table

PAGE = "Before\n<!-- a -->\nold\nlines\n<!-- end of a -->\nbetween\n<!-- a b -->\nother\n<!-- end of a b -->\nafter\n"


def test_parts_are_replaced_where_they_are_marked_and_nothing_else():
    new = replace_parts(PAGE, {"a b": r"\1 \n", "a": "new"})
    assert new == PAGE.replace("old\nlines", "new").replace("other", r"\1 \n")


WRONG = {"two": PAGE + PAGE, "none": "nothing", "no end": PAGE.replace("<!-- end of a -->", "")}


@pytest.mark.parametrize("page", WRONG.values(), ids=WRONG)
def test_a_part_without_one_place_is_an_error(page):
    with pytest.raises(ValueError, match="places '<!-- a -->', where there must be one"):
        replace_parts(page, {"a": "new"})


def test_tables_and_lists():
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n|---|---|\n| 1 | 2 |"
    assert bullets({"N": "3", "Device": "cpu"}) == "- N: 3.\n- Device: cpu."
