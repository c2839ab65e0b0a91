"""The clients of object stores: how long a request may take, who has given an answer, in which process they live."""

import functools
import os
import re
from datetime import timedelta
from typing import Any, cast

from pipeline.stores.patience import patience_s

STALL_S, PART_S, LONGEST_S = 30.0, 300.0, 3600.0
"""Seconds without a byte after which an answer is given up; for which a part of an upload may take, whose connection
says nothing while it is sent; that any request may take. A link of 70 kB/s is fast enough for all of them."""
UPLOAD_RETRY_S = 60.0
"""Seconds for which a part is sent again. After that the whole upload is."""
CLIENT_OPTIONS = (
    *("allow_http", "allow_invalid_certificates", "connect_timeout", "http1_only", "http2_only"),
    *("pool_idle_timeout", "pool_max_idle_per_host", "proxy_ca_certificate", "proxy_excludes", "proxy_url"),
    *("read_timeout", "root_certificate", "timeout", "user_agent"),
)
"""Of the store's client, as it reads them in the environment, behind a prefix."""


@functools.lru_cache
def client(root: str, retry_s: float, in_parts: bool) -> Any:
    """The client of a store; it tries again itself for `retry_s`, and for an upload `in_parts` longer."""
    from obstore.store import from_url

    global _first_user
    _first_user = os.getpid()
    retry_s = min(UPLOAD_RETRY_S, patience_s()) if in_parts else retry_s
    limits = {"timeout": LONGEST_S, "read_timeout": max(1.0, min(STALL_S, 3 * retry_s))}
    if in_parts:
        limits = {"timeout": PART_S}
    options: dict[str, Any] = {name: timedelta(seconds=limit) for name, limit in limits.items()}
    options |= _client_options(root)
    backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2}
    retry: Any = {"max_retries": 1000, "retry_timeout": timedelta(seconds=retry_s), "backoff": backoff}
    return from_url(root, client_options=cast(Any, options), retry_config=retry)


def _client_options(root: str) -> dict[str, str]:
    """The client's options in the environment (AWS_ALLOW_HTTP, AZURE_PROXY_URL, ...): ours would hide them."""
    prefix = {"s3": "AWS_", "gs": "GOOGLE_"}.get(root[:2], "AZURE_")
    found = {name: os.environ.get(prefix + name.upper()) for name in CLIENT_OPTIONS}
    return {name: value for name, value in found.items() if value is not None}


_first_user: int | None = None
"""The process in which the client's threads live; a fork has none, and would wait for ever."""


def is_forked() -> bool:
    """Whether this process is a fork of one that has used a client."""
    return _first_user not in (None, os.getpid())


def of_a_store(meta: Any) -> Any:
    """What is known of an object; raises GenericError if that was not said by a store, but by a proxy with a page."""
    from obstore.exceptions import GenericError

    if meta["e_tag"] is None:
        raise GenericError("an answer without an ETag, which is none of an object store")
    return meta


def head(store: Any, key: str) -> Any:
    """What is known of an object; raises FileNotFoundError, BaseError."""
    import obstore
    from obstore.exceptions import BaseError

    try:
        return of_a_store(obstore.head(store, key))
    except (BaseError, FileNotFoundError) as exc:
        if not re.search("status code: 40[0134]", str(exc)):
            raise
    return of_a_store(obstore.get(store, key).meta)  # whose answer has a body: the bucket may be missing, a proxy talk
