"""The counter of `vatt.kernels.counter` inside a kernel: the same words, so masks drawn here and there are the same."""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)


@triton.jit
def words(position, sample, step, stream, seed):
    """Four uint32 words for each counter (position, sample, step, stream). `seed` int64; the others integers below 2^32."""
    return tl.philox(
        seed,
        position.to(tl.uint32),
        (position * 0 + sample).to(tl.uint32),
        (position * 0 + step).to(tl.uint32),
        (position * 0 + stream).to(tl.uint32),
        n_rounds=ROUNDS,
    )


@triton.jit
def keep(position, sample, step, stream, seed, threshold):
    """Which elements dropout keeps: bool, `position` with four times the length on its last axis (2-D only).

    position: (M, N / 4) = row x ceil(C / 4) + column / 4 of each group of four columns, see `vatt.kernels.dropout`.
    threshold: rate x 2^32, rounded down.
    """
    w0, w1, w2, w3 = words(position, sample, step, stream, seed)
    # join puts its pair on a new last axis; this order makes the reshaped words run w0 w1 w2 w3.
    drawn = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(position.shape[0], 4 * position.shape[1])
    return drawn >= threshold.to(tl.uint32)
