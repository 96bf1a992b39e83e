"""Errors of the API in OpenAI's shape."""

from typing import Any

TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
"""`type` by status; others below 500 are invalid_request_error, from 500 on server_error."""


class ApiError(Exception):
    """What a client is told instead of an answer.

    `param` names the field that is to blame, `code` is for programs. `retry_after` is in whole
    seconds. `reason` is the label under which metrics count a request that was not admitted.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        reason: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.reason = reason

    def body(self) -> dict[str, Any]:
        """`{"error": {...}}`."""
        kind = TYPES.get(self.status)
        if kind is None:
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Headers that belong to it."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status == 408:  # it would take as long again
            headers["x-should-retry"] = "false"
        return headers


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 for a field of the body."""
    return ApiError(400, message, param=param, code=code)


def named_field(error: ValueError) -> str:
    """The field that a ValueError of ours begins with: `temperature is 3, expected ...`."""
    return str(error).partition(" ")[0].rstrip(":")
