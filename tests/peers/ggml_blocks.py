"""Quantized blocks and their values as ggml itself makes them: the known answers of the weight formats.

    python -m venv VENV && VENV/bin/pip install numpy llama-cpp-python==0.3.36
    VENV/bin/python tests/peers/ggml_blocks.py > model/data/reference/ggml_blocks.json

Run by hand when a format or a case is added. The inputs are made by integer arithmetic and single roundings, and
`model/src/weights/ggml.rs` makes the same ones. No importance matrix: these are the reference quantizers.
"""

import ctypes
import hashlib
import json
import pathlib

import llama_cpp
import numpy as np

FORMATS = {  # name: (ggml's number, values in a block, bytes in a block)
    "Q8_0": (8, 32, 34),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q4_K": (12, 256, 144),
    "Q6_K": (14, 256, 210),
}
LIBRARY = ctypes.CDLL(str(pathlib.Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
LIBRARY.ggml_quantize_chunk.restype = ctypes.c_size_t
F = np.float32


def states(count, seed):
    """A linear congruential generator's upper halves, 0 to 65535."""
    state, out = seed, []
    for _ in range(count):
        state = (state * 1_664_525 + 1_013_904_223) % 2**32
        out.append(state >> 16)
    return np.array(out, dtype=np.int64)


def bell(count, seed):
    """Sums of four uniform numbers of -1..1: exact, and about as weights are spread."""
    return F((states(4 * count, seed).reshape(count, 4).sum(axis=1) - 4 * 2**15) / 2**15)


def cases():
    n = 512
    index = np.arange(n)
    yield "bell", bell(n, 1) * F(0.0371)
    yield "spikes", np.where(index % 37 == 5, F(3.1) * np.sign(bell(n, 2)), bell(n, 2) * F(0.01))
    yield "zeros", np.zeros(n, F)
    yield "constant", np.full(n, 0.7, F)
    yield "constant_below_zero", np.full(n, -0.7, F)
    yield "subnormal_scales", bell(n, 3) * F(2.0**-20)
    yield "vanishing", bell(n, 4) * F(2.0**-60)
    yield "below_zero", -np.abs(bell(n, 5)) - F(0.01)
    yield "above_zero", bell(n, 6) * F(0.1) + F(5.0)
    yield "groups_of_many_sizes", bell(n, 7) * np.exp2(F(index // 16 % 13 - 6)).astype(F)
    yield "large", bell(n, 8) * F(16000.0)
    yield "ties", F(index % 37 - 18) * F(0.5)
    yield "one_in_a_block", np.where(index % 256 == 77, F(-1.25), F(0.0))
    yield "zero_groups", np.where(index // 32 % 3 == 1, F(0.0), bell(n, 9))
    yield "many", bell(1 << 16, 10) * F(0.05)


def quantized(name, values):
    number, block, size = FORMATS[name]
    values = np.ascontiguousarray(values, dtype=F)
    out = np.zeros(len(values) // block * size, np.uint8)
    pointer = values.ctypes.data_as(ctypes.c_void_p)
    written = LIBRARY.ggml_quantize_chunk(
        number, pointer, out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(0), ctypes.c_int64(len(values) // 256),
        ctypes.c_int64(256), None)
    assert written == len(out), (name, written, len(out))
    return out.tobytes()


def values_of(name, blocks):
    _, block, size = FORMATS[name]
    out = np.zeros(len(blocks) // size * block, F)
    expand = getattr(LIBRARY, f"dequantize_row_{name.lower().replace('_k', '_K')}")
    expand(blocks, out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(len(out)))
    return out.astype("<f4").tobytes()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def noise_blocks(name):
    """Bytes as no quantizer makes them; no half precision number among them is infinite or NaN."""
    return bytes(states(64 * FORMATS[name][2], 11).astype(np.uint16).__rshift__(8).astype(np.uint8) & 0x7B)


def main():
    answers = {"llama_cpp_python": llama_cpp.__version__, "formats": {}}
    for name in FORMATS:
        answers["formats"][name] = {"noise_values_sha256": sha256(values_of(name, noise_blocks(name))), "cases": {}}
        for case, values in cases():
            assert values.dtype == F, case
            blocks = quantized(name, values)
            answer = {"blocks_sha256": sha256(blocks), "values_sha256": sha256(values_of(name, blocks))}
            if len(blocks) < 1000:
                answer["blocks"] = blocks.hex()
            answers["formats"][name]["cases"][case] = answer
    print(json.dumps(answers, indent=1))


main()
