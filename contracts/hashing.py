"""Which MDP goes where: a stable, salted hash, so that a split or a canary arm needs no memory."""

import hashlib


def unit_interval(salt: str, *key: object) -> float:
    """A number in [0, 1) that depends on salt and key alone, uniform over keys."""
    text = "\0".join([salt, *map(str, key)])
    bits = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return (bits >> 11) / 2**53  # as many bits as a float holds, so that it never rounds up to 1
