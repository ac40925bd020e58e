"""The list of seeded bugs fits the code. That each is found: ``python tests/seeded_bugs.py``."""

import ast

import pytest

from seeded_bugs import BUGS, ROOT, Bug, found_by, with_bug


def test_there_are_enough_and_no_two_alike():
    assert len(BUGS) >= 30
    assert len({bug.what for bug in BUGS}) == len(BUGS)
    assert len({(bug.path, bug.right, bug.wrong) for bug in BUGS}) == len(BUGS)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_a_bug_changes_what_its_file_does(bug: Bug):
    source = (ROOT / bug.path).read_text()
    assert ast.dump(ast.parse(with_bug(bug, source))) != ast.dump(ast.parse(source))
    assert all((ROOT / "tests" / test).is_file() for test in bug.tests)


@pytest.mark.parametrize("text", ["no such text", "import torch"])
def test_a_text_that_is_not_there_once_is_refused(text: str):
    with pytest.raises(ValueError, match=r"x.py has \d times: " + text):
        with_bug(Bug("", "x.py", text, "", []), "import torch\nimport torch.nn")


def test_a_bug_is_found_and_a_change_that_is_none_survives():
    right, here = "count, rest = divmod(side, block_size)", ("thor_fx/blocks.py", ["test_blocks.py"])
    bug = Bug("", here[0], right, "count, rest = side // block_size, 0", here[1])
    assert found_by(bug).startswith("test_blocks.py::")
    assert found_by(bug._replace(wrong="count, rest = side // block_size, side % block_size")) is None
