"""A folder that a command may fill is a new one or an empty one."""

import pytest

from hydravit_hf.folders import check_new_or_empty, is_new_or_empty


def test_a_folder_is_new_or_empty_if_its_files_would_mix_with_no_others(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / ".hidden").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name, is_free in {"new": True, "empty": True, "full": False, "file": False}.items():
        assert is_new_or_empty(tmp_path / name) == is_free, name
        if is_free:
            check_new_or_empty(tmp_path / name)
        else:
            with pytest.raises(ValueError, match=f"'{tmp_path / name}' exists and is not an empty folder"):
                check_new_or_empty(tmp_path / name)
    assert not (tmp_path / "new").exists()
