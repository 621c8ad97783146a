"""Parts of messages."""

import pytest

from trainer.wording import counted, plural


@pytest.mark.parametrize(
    ("what", "of_one"),
    [
        ("pictures have no caption", "picture has no caption"),
        ("pictures are smaller than their bucket", "picture is smaller than its bucket"),
        ("caches of data sets are ignored", "cache of data sets is ignored"),
        ("tables are ignored (only these are read)", "table is ignored (only these are read)"),
        ("entries encoded", "entry encoded"),
        ("captions cannot be decoded", "caption cannot be decoded"),
        ("pictures have no mask; all of them counts", "picture has no mask; all of it counts"),
    ],
)
def test_what_is_said_of_several_is_said_of_one_in_the_singular(what, of_one):
    assert counted(1, what) == f"1 {of_one}"
    assert counted(2, what) == f"2 {what}"
    assert counted(0, what) == f"0 {what}"


def test_a_formatted_number_has_its_noun():
    assert plural("1,000", "step") == "1,000 steps"
    assert plural("1", "batch", "es") == "1 batch"
