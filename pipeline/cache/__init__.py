"""What a cache is: a manifest, commit records and the shards that they name; how it is read, checked and mended."""
