"""The form of every configuration error, stated once."""

import pytest


@pytest.fixture
def assert_refused():
    """`assert_refused(call, name, value, rule)`: `call` raises one line `NAME is VALUE, expected
    ...` with `rule` in what follows."""

    def check(call, name, value, rule):
        with pytest.raises(ValueError) as raised:
            call()
        message = str(raised.value)
        assert message.startswith(f"{name} is {value!r}, expected "), message
        assert rule in message.split(", expected ", 1)[1], message
        assert "\n" not in message

    return check
