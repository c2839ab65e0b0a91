"""The commands that read caches, on one with a tail sketch: in a folder and in an object store."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.inspection.run import inspect_cache
from pipeline.inspection.settings import InspectConfig
from pipeline.lifecycle.convert import convert_cache
from pipeline.lifecycle.export import export_cache
from pipeline.lifecycle.merge import merge_caches
from pipeline.lifecycle.settings import ConvertConfig, ExportConfig, MergeConfig
from pipeline.progress import Reporter
from pipeline.sketch import sketch_name
from stages.cache_logits.run import cache_logits
from tests.support.sketched import RANK


@pytest.fixture
def stored(sketched, url):
    """A capture into an object store."""
    cache_logits(dataclasses.replace(sketched["zarr"], out=url))
    return url


def assert_same_targets(first, second):
    for one, other in zip(open_cache(first), open_cache(second), strict=True):
        for name in ("ids", "logits", "tail_logprobs", "coefficients"):
            np.testing.assert_array_equal(getattr(one.targets, name), getattr(other.targets, name))
    ours, theirs = (open_cache(folder).sketch for folder in (first, second))
    np.testing.assert_array_equal(ours.basis, theirs.basis)


def test_cache_in_a_store_is_the_one_of_a_folder_under_every_command(sketched, stored, tmp_path):
    assert_same_targets(sketched["zarr"].out, stored)
    assert not verify_cache(stored).problems
    convert_cache(ConvertConfig(cache=stored, out=stored.parent / "converted", format="arrow"))
    merge_caches(MergeConfig(caches=(stored, stored), out=stored.parent / "merged"))
    for copy in (stored.parent / "converted", stored.parent / "merged"):
        assert not verify_cache(copy).problems
        assert_same_targets(stored, copy)
    export_cache(ExportConfig(cache=stored, out=tmp_path / "export", temperature=2.0))
    rows = sum(pq.read_metadata(path).num_rows for path in (tmp_path / "export").glob("**/*.parquet"))
    assert rows == len(open_cache(stored))
    (stored / sketch_name(open_cache(stored).manifest.sketch)).unlink()
    assert any("sketch-" in problem for problem in verify_cache(stored).problems)


@pytest.mark.parametrize("container", ["arrow", "zarr"])
def test_inspect_tells_what_the_sketch_is_worth(sketched, tmp_path, container):
    out = sketched[container].out
    page = tmp_path / "page.html"
    lines = list(inspect_cache(InspectConfig(cache=out, html=page), Reporter()))
    cache = open_cache(out)
    recorded = [commit.statistics["mean_sketch_kl"] for commit in cache.commits]
    mean = np.average(recorded, axis=0, weights=[commit.num_targets for commit in cache.commits])
    size = (out / sketch_name(cache.manifest.sketch)).stat().st_size
    (line,) = [line for line in lines if line.strip().startswith("sketch")]
    assert f"{RANK} coefficients a target, {size / 1e6:,.2f} MB" in line
    assert f"{mean[0]:.3f} nats at T = 1, {mean[1]:.3f} nats at T = 2" in line
    assert f"{mean[0]:.3f} nats at T = 1" in page.read_text()
    assert any("of a target" in line and "sketch " in line for line in lines)


def test_inspect_of_a_store_tells_it_too(stored):
    lines = list(inspect_cache(InspectConfig(cache=stored), Reporter()))
    assert any(line.strip().startswith("sketch") and "MB for the whole cache" in line for line in lines)
