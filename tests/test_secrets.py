"""Credentials stay where they are: in no file of a run, no message, no name of a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, StorageError
from pipeline.redaction import without_secrets
from pipeline.runs.heartbeat import one_line
from pipeline.settings import load_config
from pipeline.stores.client import client
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.places import store_of
from stages.cache_logits.settings import CacheConfig
from tests.support.helpers import run
from tests.support.workers import new_cache, run_worker, tiny_corpus

PLANTED = "pl4nted+Secret/Value=="
QUOTED = "pl4nted%2BSecret%2FValue%3D%3D"
CREDENTIALS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_SAS_TOKEN", "HF_TOKEN", "MY_PASSWORD")


def shows_secret(text: str | bytes) -> bool:
    """Whether any part of it is told."""
    plain = text.decode(errors="replace") if isinstance(text, bytes) else text
    return any(part in plain for part in ("pl4nted", "s3cr3t"))


@pytest.fixture
def planted(monkeypatch):
    for name in CREDENTIALS:
        monkeypatch.setenv(name, PLANTED)
    client.cache_clear()  # clients read the environment when they are made
    yield
    client.cache_clear()


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:s3cr3t@bucket/cache",
        "s3://s3cr3t@bucket/cache",
        "az://container/cache?sv=2024&sig=s3cr3t",
        "abfss://container:s3cr3t@account.dfs.core.windows.net/cache",
        "https://user:s3cr3t@host/bucket?token=s3cr3t",
        "s3://bucket/cache?X-Amz-Signature=s3cr3t",
    ],
)
def test_url_with_credentials_is_refused_without_telling_them(tmp_path, url):
    for use in (
        lambda: store_of(url),
        lambda: load_config(CacheConfig, None, {"teacher": "t", "corpus": "c", "out": url}),
        lambda: load_config(CacheConfig, None, {"teacher": url, "corpus": "c", "out": "o"}),
        lambda: store_of(url.replace("s3:", "s4:").replace("az:", "a2:").replace("abfss:", "abfsss:")),
    ):
        with pytest.raises(ConfigError, match=r"\*\*\*") as refused:
            use()
        assert not shows_secret(str(refused.value))
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"cache: {url}\n")
    for arguments in (("status", url), ("verify", url), ("status", "--config", settings)):
        code, out, err = run(*arguments)
        assert code == 2
        assert not shows_secret(out + err)


def test_urls_without_credentials_stay_as_they_are():
    for url in ("s3://bucket/a@b/c", "gs://b/x", "abfss://container@account.dfs.core.windows.net/cache"):
        assert str(store_of(url)) == url
        assert without_secrets(f"{url}: it fails") == f"{url}: it fails"


def test_secrets_are_in_no_file_of_a_run_and_in_nothing_that_it_prints(server, url, tmp_path, planted):
    """A run whose store refuses now and then, with every credential planted."""
    corpus = tiny_corpus(tmp_path / "corpus", 6)
    server.fail(("500", "PUT", "/shards/", 1), ("deny", "GET", "events", 1))
    run_worker(new_cache(url, corpus), corpus)
    printed = [run("status", str(url), "--events", 9), run("verify", str(url)), run("status", str(url), "--json")]
    printed.append(run("export", str(url), "--out", str(tmp_path / "out"), "--workers", 1))
    server.fail(("deny", "GET", "manifest.json", 10))
    printed.append(run("verify", str(url)))
    assert printed[-1][0] == 2
    server.fail()
    assert not any(shows_secret(out + err) for _, out, err in printed)
    objects = [url]
    while objects:
        path = objects.pop()
        below = [path / name for name in path.names()]
        objects += below
        assert below or not shows_secret(path.read()), path
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if shows_secret(path.read_bytes())] == []


def test_messages_of_other_libraries_are_told_without_secrets(planted, monkeypatch):
    error = RuntimeError(f"GET https://h/c?sig={QUOTED} with {PLANTED} or {QUOTED} as http://u:s3cr3t@proxy failed")
    assert one_line(error) == "RuntimeError: GET https://h/c?*** with *** or *** as http://***@proxy failed"
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AZURE_ALLOW_HTTP", "true")
    with pytest.raises(StorageError) as refused:
        ObjectStore("az://container-of-secrets/x", patience_s=0.1).read()
    assert not shows_secret(str(refused.value))


def test_download_by_a_helper_has_no_secret_among_its_arguments(url, planted, tmp_path):
    (url / "file").write(b"contents")
    command = [sys.executable, "-m", "pipeline.stores.object_store", str(url / "file"), str(tmp_path / "copy"), "8"]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
    assert not shows_secret(Path(f"/proc/{process.pid}/cmdline").read_bytes())
    assert process.wait() == 0
    assert (tmp_path / "copy").read_bytes() == b"contents"
    assert any(shows_secret(value) for value in os.environ.values())
