"""Seeds for the parts of a run, each derived from a few numbers."""

from __future__ import annotations

import numpy as np


def seed_of(*numbers: int) -> int:
    """Derive one seed from whole numbers from 0, such as (seed, step).

    Different tuples give different seeds (up to collisions of 32 bits), also where one is the other with zeros added.
    """
    # the count comes first, because a SeedSequence ignores zeros at the end of its numbers
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0])
