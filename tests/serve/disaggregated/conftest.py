"""The form of configuration errors, as the tests of the config check it."""

from tests.config.conftest import assert_refused

__all__ = ["assert_refused"]
