"""Errors for users: one line, status 2, once per node."""

from __future__ import annotations

import pytest

from metis.errors import CheckpointError, ConfigError, MetisError, ShapeError, nearest_name, report_and_exit


def test_the_text_is_where_and_what():
    error = ConfigError("--recipe", "must be known, received 'x'")
    assert str(error) == "--recipe: must be known, received 'x'"
    assert (error.where, error.message) == ("--recipe", "must be known, received 'x'")


@pytest.mark.parametrize("cls", [ConfigError, ShapeError, CheckpointError])
def test_the_text_survives_a_library_that_wraps_errors(cls: type[MetisError]):
    """megatron-core re-raises `type(error)(text)` while it builds modules."""
    again = cls(f"{cls('layer', 'must fit')} while building")
    assert str(again) == "layer: must fit while building"


def test_users_errors_are_also_the_builtin_kind():
    assert issubclass(ConfigError, ValueError) and issubclass(ShapeError, ValueError)
    assert issubclass(CheckpointError, RuntimeError)
    assert all(issubclass(cls, MetisError) for cls in (ConfigError, ShapeError, CheckpointError))


def test_the_nearest_name_is_suggested_and_a_far_one_is_not():
    assert nearest_name("metsi", ["bf16", "metis"]) == "; did you mean 'metis'?"
    assert nearest_name("zzz", ["bf16", "metis"]) == ""
    assert nearest_name("x", []) == ""


def test_one_line_and_status_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as caught:
        report_and_exit(ConfigError("f.yaml", "must hold valid yaml, received:\n  line 1\n  ^"))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "error: f.yaml: must hold valid yaml, received: line 1 ^\n"


def test_other_ranks_of_the_node_leave_silently_with_the_same_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as caught:
        report_and_exit(ConfigError("x", "y"))
    assert caught.value.code == 2 and capsys.readouterr().err == ""
