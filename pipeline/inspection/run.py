"""`pipeline inspect`: a cache as a person reads it, on a terminal and as a page."""

import re
from collections.abc import Iterator

from pipeline.cache.manifest import TOKENIZER, CacheManifest
from pipeline.cache.reader import ReadableCache, readable_cache
from pipeline.errors import ConfigError
from pipeline.hub import located
from pipeline.inspection.figures import Figures
from pipeline.inspection.lines import parts_line, sequence_lines, summary_lines, worst_lines
from pipeline.inspection.page import write_inspection
from pipeline.inspection.sample import Sample
from pipeline.inspection.settings import InspectConfig
from pipeline.inspection.summary import Summary, bytes_by_part
from pipeline.progress import Reporter
from pipeline.spelling import Speller
from pipeline.targets import column_of
from pipeline.tokenizer import identify, load_tokenizer

KEY = re.compile("[0-9a-f]{32}")


def inspect_cache(config: InspectConfig, reporter: Reporter) -> Iterator[str]:
    """Lines to print; with `html`, a page as well. Raises ConfigError or CacheError."""
    config = located(config, "tokenizer", reporter, with_weights=False)
    cache = readable_cache(config.cache)
    temperature = _temperature(config, cache.manifest)
    number = None if config.sequence is None else _number_of(cache, config.sequence)
    reads_sample = bool(config.worst or config.html)
    needs_text = reads_sample or number is not None
    speller = _speller(config, cache, reporter) if needs_text else Speller(None)
    if number is not None:
        yield from sequence_lines(cache, number, speller, temperature, config.entries, config.longest)
    summary = Summary.of(cache)
    if number is None:
        yield from summary_lines(summary)
    if reads_sample:
        sample = Sample.draw(cache, config.sample, config.shards, config.seed)
        figures = Figures(cache.manifest, temperature, config.worst, charts=config.html is not None)
        figures.add_all(sample.read(reporter))
        parts = bytes_by_part(cache, sample.partitions)
    else:  # of a cache in a store no shard is fetched for it
        parts = bytes_by_part(cache, list(cache.records)[:1] if cache.folder.path is not None else [])
    if number is None and parts:
        yield parts_line(parts)
    if config.worst:
        yield f"the worst of {sample.described()}, at T = {temperature:g}; sequence:token"
        yield from worst_lines(cache, figures, speller)
    if config.html is not None:
        write_inspection(config, summary, parts, sample, figures, speller, number)
        yield f"{config.html}: figures of {sample.described()}"


def _temperature(config: InspectConfig, manifest: CacheManifest) -> float:
    if config.temperature is None:
        return 1.0 if 1.0 in manifest.temperatures else min(manifest.temperatures)
    column_of(manifest.temperatures, config.temperature)
    return float(config.temperature)


def _number_of(cache: ReadableCache, wanted: str) -> int:
    """The number of a sequence that is given by number or key; raises ConfigError if there is none."""
    if KEY.fullmatch(wanted):
        number = cache.find(bytes.fromhex(wanted))
        if number is not None:
            return number
        raise ConfigError(f"{cache.folder}: no sequence with the key {wanted} among those that are captured.")
    if not (wanted.isascii() and wanted.isdecimal() and int(wanted) < len(cache)):
        raise ConfigError(
            f"sequence is {wanted!r}; give a number from 0 to {len(cache) - 1}, or a key of 32 hexadecimal digits."
        )
    return int(wanted)


def _speller(config: InspectConfig, cache: ReadableCache, reporter: Reporter) -> Speller:
    """Tokens as text by the tokenizer that made them; as ids where the cache's own cannot be read, which is said."""
    place = cache.folder / TOKENIZER if config.tokenizer is None else config.tokenizer
    try:
        tokenizer = load_tokenizer(place, trust_remote_code=config.trust_remote_code, note=reporter.note)
        if difference := identify(tokenizer).difference(cache.manifest.tokenizer):
            raise ConfigError(f"{place}: is not the tokenizer of the cache's ids: {difference}.")
    except ConfigError as problem:
        if config.tokenizer is not None:
            raise
        reporter.note(f"tokens are shown as ids: {problem}")
        return Speller(None)
    return Speller(tokenizer)
