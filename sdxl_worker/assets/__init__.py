"""A reference to a checked local file: sources, fetching, the cache shared by all workers."""
