"""Patience with an object store: which of its failures pass, how long they are waited for, what is said meanwhile.

An outage (no connection, no answer, a server error, throttling) is waited out for LOGIT_CACHE_PATIENCE_S and then a
StorageSilentError, with which a launcher runs the command again. What may pass by itself but is rather a mistake
(credentials that have run out, a wrong clock, an answer that is none of a store) is waited for DOUBT_S. A refusal is
final at once. Both are a StorageError.
"""

import logging
import math
import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import ConfigError, StorageError, StorageSilentError
from pipeline.progress import duration
from pipeline.stopping import interrupted

PATIENCE = "LOGIT_CACHE_PATIENCE_S"
"""Environment variable: seconds for which a store that does not answer is waited for."""
DEFAULT_S = 600.0
DOUBT_S = 60.0
"""Seconds for which a failure is waited for that is rather a mistake than an outage."""
CLIENT_S = 10.0
"""Seconds for which the store's client tries again itself; what we try again is signed anew."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
SAY_AFTER_S = 10.0
"""A store that is silent for so long is spoken of."""
OUTAGE, DOUBT, REFUSAL, ABSENT = "outage", "doubt", "refusal", "absent"
"""What a failure may be. Absent: the store has answered that there is no such object."""

Result = TypeVar("Result")
_say = logging.getLogger(__name__).warning
"""Standard error unless a program sets it up otherwise, in all our processes: no stage hands a reporter down."""


def number_of_environment(name: str, default: float) -> float:
    """A setting from the environment, not negative; raises ConfigError."""
    text = os.environ.get(name) or str(default)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number >= 0:
        raise ConfigError(f"{name} is {text!r}; expected a number, 0 or more, like {default:g}.")
    return number


def patience_s() -> float:
    """Seconds for which an outage is waited for."""
    return number_of_environment(PATIENCE, DEFAULT_S)


def patience_of_environment() -> dict[str, str]:
    """The setting, if there is one, for processes on other machines; raises ConfigError."""
    return {PATIENCE: f"{patience_s():g}"} if os.environ.get(PATIENCE) else {}


class _Silence:
    """What is known of one store by all threads of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting = 0
        self._since: float | None = None

    @property
    def said(self) -> bool:
        """The store is known to be silent."""
        return self._since is not None

    def begins(self) -> None:
        """A request has failed and waits."""
        with self._lock:
            self._waiting += 1

    def ends(self) -> None:
        """A request waits no more, whether it was answered or given up."""
        with self._lock:
            self._waiting -= 1

    def say(self, store: str, line: str, since: float) -> None:
        """Say it, once."""
        with self._lock:
            first, self._since = self._since is None, since if self._since is None else self._since
        if first:
            _say(f"{store}: does not answer: {line}; waiting up to {_shown(patience_s())} ({PATIENCE})")

    def answered(self, store: str) -> None:
        """Say, once, that all who waited have been answered."""
        with self._lock:
            since = self._since if not self._waiting else None
            if since is not None:
                self._since = None
        if since is not None:
            _say(f"{store}: answers again, after {duration(time.monotonic() - since)}")


_silences: dict[str, _Silence] = defaultdict(_Silence)


def ask(
    store: str, request: Callable[[float], Result], what: str, describe: Callable[[str], str], at_most_s: float | None
) -> Result:
    """The answer to a request, which gets the seconds for which the client may try again itself.

    With `at_most_s` it is a hasty one: no longer than that, and once only while the store is known to be silent. A
    message is `what` failed and what `describe` makes of the reason. Raises FileNotFoundError, StorageError.
    """
    from obstore.exceptions import BaseError

    with _Waiting(store, lambda exc: f"{what}: {describe(reason_of(exc))}", at_most_s) as waiting:
        while True:
            started = time.monotonic()
            try:
                return request(waiting.client_s)
            except (BaseError, FileNotFoundError) as exc:
                kind = kind_of(exc)
                if kind == ABSENT:
                    raise
                waiting.failed(kind, exc, started)


class _Waiting:
    """One request from its first try to its answer, and what its failures mean for it."""

    def __init__(self, store: str, describe: Callable[[BaseException], str], at_most_s: float | None) -> None:
        self._store, self._describe = store, describe
        self._silence, self._interrupted = _silences[store], interrupted()
        self._limit_s = patience_s() if at_most_s is None else min(at_most_s, patience_s())
        if at_most_s is not None and self._silence.said:
            self._limit_s = 0.0
        self.client_s = min(CLIENT_S, self._limit_s)
        self._since: float | None = None
        self._pause_s = FIRST_PAUSE_S

    def __enter__(self) -> "_Waiting":
        return self

    def __exit__(self, exc_type: type | None, *ignored: object) -> None:
        if self._since is not None:
            self._silence.ends()
        if exc_type is None or issubclass(exc_type, FileNotFoundError):
            self._silence.answered(self._store)

    def failed(self, kind: str, exc: BaseException, started: float) -> None:
        """Wait until the request may be made again; raises StorageError if it may not. `started`: the last try."""
        now = time.monotonic()
        if self._since is None:
            self._silence.begins()
            self._since = now - min(now - started, self.client_s)
        limit_s = min(self._limit_s, DOUBT_S) if kind == DOUBT else self._limit_s
        if kind == REFUSAL or now - self._since + self._pause_s > limit_s or self._interrupted.wait(self._pause_s):
            raise self._given_up(kind, exc) from exc
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        if time.monotonic() - self._since >= SAY_AFTER_S:
            self._silence.say(self._store, self._describe(exc), self._since)

    def _given_up(self, kind: str, exc: BaseException) -> StorageError:
        reason, waited_s = self._describe(exc), time.monotonic() - (self._since or math.inf)
        if kind == OUTAGE:
            return StorageSilentError(f"{reason}; no answer for {_shown(waited_s)}: run the same command again.")
        return StorageError(reason + next((advice for code, advice in _ADVICE.items() if code in str(exc)), ""))


def _shown(seconds: float) -> str:
    return duration(seconds) if math.isfinite(seconds) else "for ever"


def is_bucket_missing(exc: BaseException) -> bool:
    """Whether it is the bucket or container that is not there, and not the object."""
    return bool(re.search("NoSuchBucket|ContainerNotFound|bucket does not exist", str(exc)))


def reason_of(exc: BaseException) -> str:
    """What a failure says, on one line, with the cause that the client has put into its debugging notes."""
    text, _, notes = str(exc).partition("\n\nDebug source")
    text = _RETRIES.sub(":", " ".join(text.split()))
    causes = re.findall(r'(?:message|error): "([^"]+)"|\b(TimedOut|Invalid[A-Z]\w+)\b', notes)
    cause = "".join(causes[-1]) if causes else ""
    return f"{text} ({cause})" if cause and cause not in text else text


def kind_of(exc: BaseException) -> str:
    """OUTAGE, DOUBT, REFUSAL or ABSENT, from what the client makes of an answer: a text, and few types."""
    from obstore.exceptions import AlreadyExistsError, GenericError

    text = str(exc)
    status = int(found[1]) if (found := re.search(r"status code: (\d{3})", text)) else 0
    passes = status in (408, 409, 425, 429) or (status >= 500 and status not in (501, 505)) or _PASSES.search(text)
    if _EXPIRED.search(text) or _NO_CREDENTIALS in text or (_PAGE.search(text) and not passes):
        return DOUBT
    if is_bucket_missing(exc):
        return REFUSAL
    if isinstance(exc, FileNotFoundError):
        return OUTAGE if "NoSuchUpload" in text else ABSENT  # an upload whose last answer was lost
    if isinstance(exc, AlreadyExistsError):  # a conflict with another request under way
        return OUTAGE
    if not isinstance(exc, GenericError):
        return REFUSAL
    if status:
        return OUTAGE if passes else REFUSAL
    return REFUSAL if "builder error" in text else DOUBT if _STRANGE.search(text) else OUTAGE


_RETRIES = re.compile(r" in [0-9.]+\S*s(, after \d+ retries, max_retries: \d+, retry_timeout: \S+)? -")
"""What the client says of its own attempts, which are not all."""
_EXPIRED = re.compile("ExpiredToken|TokenRefreshRequired|RequestTimeTooSkewed|RequestExpired|ExpiredAuthentication")
_NO_CREDENTIALS = "://169.254."
"""Where a client looks for the credentials of a machine if the environment has none."""
_PAGE = re.compile("<html|<!doctype", re.IGNORECASE)
_PASSES = re.compile("<Code>(RequestTimeout|SlowDown|InternalError|ServiceUnavailable|OperationAborted)<")
"""Of errors of the class 400."""
_STRANGE = re.compile(
    "non-partial response|metadata from headers|Got invalid|following redirect|Received redirect|without an ETag|"
    "kind: InvalidData|InvalidCertificate"
)
"""An answer that is none of a store's: a proxy's page, say."""
_ADVICE = {
    "ExpiredToken": "; the credentials have run out: give new ones and run the same command again",
    "RequestTimeTooSkewed": "; this machine's clock is wrong: set it and run the same command again",
    _NO_CREDENTIALS: "; the environment has no credentials, and this machine gives none",
    "NoSuchBucket": "; there is no such bucket",
    "without an ETag": "; look at the endpoint and at proxies in between",
    "<html": "; look at the endpoint and at proxies in between",
    "builder error": "; look at the endpoint (AWS_ALLOW_HTTP=true if it has no TLS)",
}
