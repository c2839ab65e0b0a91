"""From a path or a URL to its store."""

from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.files import at_home
from pipeline.redaction import without_credentials, without_secrets
from pipeline.stores.local_store import LocalStore
from pipeline.stores.store import Store
from pipeline.tables import Table

OBJECT_STORE = "pipeline.stores.object_store:ObjectStore"
SCHEMES: Table[type] = Table(dict.fromkeys(("s3", "s3a", "gs", "az", "abfs", "abfss"), OBJECT_STORE))
"""Stores by the scheme of a URL; a class is made from the URL."""


def store_of(value: str | Path | Store) -> Store:
    """The store of a folder of this machine, ~ replaced, or of a URL; ConfigError if it carries credentials.

    URLs are written into manifests, scripts, logs and messages.
    """
    if isinstance(value, Store):
        return value
    url = str(value)
    if "://" not in url:
        return LocalStore(at_home(Path(value)))
    if (bare := without_credentials(url)) != url:
        raise ConfigError(
            f"{bare}: carries credentials or a query; give them in the environment, as the store's own tools read them."
        )
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise ConfigError(
            f"{without_secrets(url)}: not the URL of an object store; expected {'://..., '.join(SCHEMES)}://..."
        )
    return SCHEMES[scheme](url)
