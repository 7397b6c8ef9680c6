"""Weights and inputs made from names alone, bit for bit the same here and in Rust (`lora_models::weights`).

Golden files can then hold outputs only: whoever reads them makes the weights and inputs afresh.

* Generator: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
* Key of a tensor: the FNV-1a 64-bit hash of its full name's UTF-8 bytes, as (low 32 bits, high 32 bits).
* Element i (row-major) is word i % 4 of the block with counter (i / 4 low 32 bits, i / 4 high 32 bits, 0, 0).
* u = float32(word >> 8) * 2^-23 - 1, in [-1, 1), exact in float32.

Values, each one float32 multiplication away from u (norms' weights: one more addition):

| tensor                                   | value                                                       |
|------------------------------------------|-------------------------------------------------------------|
| 1-D, name ends in ".weight" (norms) or   |                                                             |
| ".running_var"                           | 1 + float32(0.1) * u                                        |
| name ends in ".bias" or ".running_mean"  | float32(0.05) * u                                           |
| all other weights, LoRA down             | float32(sqrt(3 / fan_in)) * u, fan_in = product(shape[1:])  |
| LoRA up                                  | float32(0.02) * u                                           |
| inputs (unit variance)                   | float32(sqrt(3)) * u                                        |
| probes                                   | u                                                           |

Weights are called by component and state-dict name: "unet.", "vae.", "text_encoder." + the name in diffusers or
transformers; text encoder names always have the `text_model.` level, whether the library's version has it or not.
"""

import math

import numpy as np

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


def philox4x32(counter, key):
    """Blocks of four 32-bit words; `counter` is four uint64 arrays of 32-bit values, `key` two integers."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        left = np.uint64(MULTIPLIERS[0]) * c0
        right = np.uint64(MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (
            (right >> SHIFT) ^ c1 ^ np.uint64(k0),
            right & MASK,
            (left >> SHIFT) ^ c3 ^ np.uint64(k1),
            left & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def fnv1a64(data):
    """The FNV-1a hash, 64 bits."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def words(name, count):
    """The first `count` 32-bit words that belong to a name."""
    hashed = fnv1a64(name.encode())
    blocks = np.arange((count + 3) // 4, dtype=np.uint64)
    zero = np.zeros_like(blocks)
    made = philox4x32((blocks & MASK, blocks >> SHIFT, zero, zero), (hashed & 0xFFFFFFFF, hashed >> 32))
    return made.reshape(-1)[:count]


def uniform(name, shape):
    """float32 numbers in [-1, 1) that belong to a name."""
    made = (words(name, math.prod(shape)) >> np.uint64(8)).astype(np.float32)
    return (made * np.float32(2.0**-23) - np.float32(1.0)).reshape(shape)


def weight(name, shape):
    """A weight by the rules above."""
    u = uniform(name, shape)
    if len(shape) == 1 and name.endswith((".weight", ".running_var")):
        return np.float32(1.0) + np.float32(0.1) * u
    if name.endswith((".bias", ".running_mean")):
        return np.float32(0.05) * u
    return np.float32(math.sqrt(3.0 / math.prod(shape[1:]))) * u


def lora_up(name, shape):
    """A LoRA's second matrix, small but not zero."""
    return np.float32(0.02) * uniform(name, shape)


def activation(name, shape):
    """An input of unit variance."""
    return np.float32(math.sqrt(3.0)) * uniform(name, shape)


def check():
    """The published known answers (Random123, kat_vectors, philox4x32 10) and FNV's own."""
    top = 0xFFFFFFFF
    known = [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((top,) * 4, (top, top), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, expected in known:
        found = " ".join(f"{int(word):08x}" for word in philox4x32(counter, key))
        assert found == expected, f"philox {counter} {key}: expected {expected}, found {found}"
    assert fnv1a64(b"") == 0xCBF29CE484222325
    assert fnv1a64(b"foobar") == 0x85944171F73967E8
    tensor = weight("unet.conv_in.weight", (32, 4, 3, 3))
    assert tensor.dtype == np.float32 and abs(float(tensor.std()) * 6.0 - 1.0) < 0.05


check()

if __name__ == "__main__":
    print("known answers agree")
