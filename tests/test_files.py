import json
import math
import os

import pytest

from trainerkit.files import replacing, write_json


def test_replacing_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_replacing_gives_the_rights_that_open_gives(tmp_path):
    with replacing(tmp_path / "new") as temporary:
        temporary.write_text("x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_write_json_makes_null_of_what_json_cannot_say(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"a": [1.5, math.nan, (math.inf, "x")], "b": None})
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == {"a": [1.5, None, [None, "x"]], "b": None}
