"""What an error of the operating system turns into."""

import pytest

from megalong.utils.errors import UserError, system_errors_of


@pytest.mark.parametrize(
    "error, message",
    [
        (PermissionError(13, "Permission denied", "run"), "--load run: Permission denied"),
        (PermissionError(13, "Permission denied", "run/x"), "--load run: run/x: Permission denied"),
        (OSError(28, "No space left on device"), "--load run: No space left on device"),
        (OSError("of a library's own"), "--load run: of a library's own"),
    ],
)
def test_it_names_the_flag_the_file_and_the_reason(error, message):
    with pytest.raises(UserError) as raised, system_errors_of("--load", "run"):
        raise error
    assert str(raised.value) == message and raised.value.__cause__ is error


def test_other_errors_stay_what_they_are():
    with pytest.raises(ZeroDivisionError), system_errors_of("--load", "run"):
        raise ZeroDivisionError
