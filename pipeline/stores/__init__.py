"""Where caches lie: folders of this machine and object stores, by one contract."""
