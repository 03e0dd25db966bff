"""A server that speaks OpenAI's protocol for chats: one question, one reply."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from typing import Any
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import HTTPError
from urllib3.util import Retry, Timeout

_CONNECT_S = 10
_MOST_BYTES = 1 << 20
_AGAIN = (408, 429, 500, 502, 503, 504)


class RefusedError(ValueError):
    """The server will answer no question, however often it is asked."""


class NoReplyError(Exception):
    """The server gave no reply to this question: too late, failing, or not in the protocol."""


@dataclass(frozen=True)
class ChatServer:
    """A model behind an endpoint such as `http://localhost:8000/v1`.

    Raises ValueError for an endpoint that is no address, or has a password in it.
    """

    endpoint: str
    model: str
    max_tokens: int
    concurrency: int
    timeout_s: float = 60
    """Of one try."""
    tries: int = 4
    key: str | None = field(default=None, repr=False)
    """Sent as it is, and said nowhere."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(
                "endpoint must be an address such as http://localhost:8000/v1, without a query"
            )
        if parts.username or parts.password:
            raise ValueError("endpoint must have no user or password; name a variable by --key-env")

    @cached_property
    def _pool(self) -> urllib3.PoolManager:
        retries = Retry(
            total=self.tries - 1,
            redirect=False,
            status_forcelist=_AGAIN,
            allowed_methods=None,
            backoff_factor=0.5,
            retry_after_max=ceil(self.timeout_s),
            raise_on_status=False,
            raise_on_redirect=False,
        )
        timeout = Timeout(connect=_CONNECT_S, read=self.timeout_s)
        return urllib3.PoolManager(maxsize=self.concurrency, retries=retries, timeout=timeout)

    def asked(self, prompt: str) -> dict[str, Any]:
        """The body of the question, which decides the reply."""
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }

    def reply(self, prompt: str) -> str:
        """The text of the reply. Raises RefusedError or NoReplyError."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            with self._pool.request(
                "POST",
                f"{self.endpoint.rstrip('/')}/chat/completions",
                body=json.dumps(self.asked(prompt)).encode(),
                headers=headers,
                preload_content=False,
            ) as response:
                status, data = response.status, self._whole(response)
        except HTTPError as error:
            raise NoReplyError(type(error).__name__) from None
        if status in _AGAIN or status >= 500:
            raise NoReplyError(f"status {status}")
        if status != 200:
            # What the server says may hold a part of the key.
            raise RefusedError(
                f"the server answers with status {status}; check the endpoint, the model's name "
                "and the key (--key-env names the variable that holds it)"
            )
        try:
            text = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise NoReplyError("a reply that is not in the protocol") from None
        if not isinstance(text, str):
            raise NoReplyError("a reply without a text")
        return text

    def _whole(self, response: urllib3.BaseHTTPResponse) -> bytes:
        """A body that comes in time, and is no flood."""
        until, data = time.monotonic() + self.timeout_s, b""
        while part := response.read1(1 << 16):
            data += part
            if len(data) > _MOST_BYTES or time.monotonic() > until:
                raise NoReplyError("a reply that does not end")
        return data
