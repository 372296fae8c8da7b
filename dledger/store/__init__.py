"""A replicated log's bytes on disk: segments, side rows, term and vote, recovery."""
