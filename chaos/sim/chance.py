"""Randomness of a simulation: one stream per component, named, all from one seed.

Each link, disk, node and client owns a stream, so that removing one fault from a schedule does not reshuffle the others
(chaos.md 5.3). A name is hashed with SHA-512 by `Random` itself: the streams do not depend on PYTHONHASHSEED.
"""

from __future__ import annotations

from random import Random


def stream(seed: int, name: str) -> Random:
    """The random numbers of the component `name` under `seed`."""
    return Random(f"{seed}/{name}")
