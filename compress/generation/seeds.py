"""Seeds for the parts of a run, each derived from a few numbers."""

from __future__ import annotations

import numpy as np


def seed_of(*numbers: int) -> int:
    """Derive one seed from non-negative integers, such as (seed, step).

    Different tuples give different seeds, except for 32-bit collisions. This holds even if one tuple is the other with
    zeros appended.
    """
    # the count comes first, because a SeedSequence ignores trailing zeros
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0])
