"""What must not be shown: credentials in URLs, and secrets of the environment."""

import os
import re
import urllib.parse

_USER = re.compile(r"\b((?!abfss?:)[a-z0-9+]+://|abfss?://[^/@\s]*:)[^/@\s]*@")
"""User and password before the host; in abfs://container@account the first is none."""
_QUERY = re.compile(r"(\b[a-z0-9+]+://[^\s?\"']*)\?[^\s\"')]*")
_SECRET_NAME = re.compile("SECRET|TOKEN|PASSWORD|CREDENTIAL|SIGNATURE|_SAS|_KEY")
LEAST_SECRET = 8
"""Characters; a shorter value might be a word of the message."""


def without_secrets(text: str) -> str:
    """The text with *** for what its URLs carry of user, password and query, and for secrets of the environment."""
    text = without_credentials(text)
    secrets = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= LEAST_SECRET}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***").replace(urllib.parse.quote(secret, safe=""), "***")
    return text


def without_credentials(text: str) -> str:
    """The text with *** for what its URLs carry of user, password and query."""
    return _QUERY.sub(r"\1?***", _USER.sub(r"\1***@", text))
