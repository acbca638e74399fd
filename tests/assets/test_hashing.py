"""sha256 beside the transfer is the sha256 of the bytes, however they are cut."""

from __future__ import annotations

import hashlib
import random

import pytest

from sdxl_worker.assets.hashing import WORTH_A_THREAD, BackgroundSha256

CONTENT = random.Random(0).randbytes(3 * WORTH_A_THREAD)


@pytest.mark.parametrize("step", [1000, WORTH_A_THREAD - 1, WORTH_A_THREAD, len(CONTENT)])
def test_the_digest_is_that_of_all_chunks(step: int):
    with BackgroundSha256() as digest:
        for start in range(0, len(CONTENT), step):
            digest.update(CONTENT[start : start + step])
        assert digest.hexdigest() == hashlib.sha256(CONTENT).hexdigest()


def test_a_restart_forgets_what_came_before():
    with BackgroundSha256() as digest:
        digest.update(CONTENT)
        digest.restart()
        digest.update(b"abc")
        # The test vector of FIPS 180-4.
        assert digest.hexdigest() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
