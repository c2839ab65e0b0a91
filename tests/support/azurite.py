"""Azurite, Azure's own emulator of its Blob Storage, on loopback."""

import base64
import contextlib
import hmac
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

from tests.support.leftovers import kept

INSTALLED = Path(sys.prefix) / "azurite" / "node_modules" / ".bin" / "azurite-blob"
"""Where `make slow` puts it."""
ACCOUNT, KEY = "test", base64.b64encode(b"of this test alone").decode()


def find() -> str | None:
    """Its command, if it is installed."""
    return str(INSTALLED) if INSTALLED.is_file() else shutil.which("azurite-blob")


@contextlib.contextmanager
def running() -> Iterator[dict[str, str]]:
    """A server with the container `bucket`, in memory; the environment that leads to it."""
    command = [find(), "--blobHost", "127.0.0.1", "--blobPort", "0", "--inMemoryPersistence", "--skipApiVersionCheck"]
    command += ["--silent", "--disableTelemetry"]
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            while "successfully listens on" not in (line := process.stdout.readline()):
                assert line, "Azurite ended before it listened"
            address = line.split()[-1]
            make = f"{address}/{ACCOUNT}/bucket?restype=container"
            request = urllib.request.Request(make, method="PUT", headers=_signed_headers())
            urllib.request.urlopen(request, timeout=60).close()
            with kept(process.pid):
                yield {
                    "AZURE_STORAGE_USE_EMULATOR": "true",
                    "AZURITE_BLOB_STORAGE_URL": address,
                    "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
                    "AZURE_STORAGE_ACCOUNT_KEY": KEY,
                }
        finally:
            process.kill()


def _signed_headers() -> dict[str, str]:
    """Of the request that makes the container: Azure's "shared key" signature of an empty PUT."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    lines = [f"{name}:{value}" for name, value in headers.items()]
    text = "\n".join(["PUT", *[""] * 11, *lines, f"/{ACCOUNT}/{ACCOUNT}/bucket", "restype:container"])
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), "sha256")).decode()
    return headers | {"Authorization": f"SharedKey {ACCOUNT}:{signature}"}
