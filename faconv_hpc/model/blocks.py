"""The passes of a step as Triton kernels, for a GPU; fused.py launches them and says what they are given.

Tensors are planar, (batch, channels, rows, columns). A program has a block of cells of one sample, N of them side by
side; those beyond the edges of a tile are masked. m of a block, F channels, stays where it is summed up, and so do the
pre-activations of C channels at a time, R = 4 C rows that come out of one product: neither goes through memory. Sums
are made in float32; what is multiplied is of the activations' type. A sample's numbers are counted in 32 bits.
"""

import triton
import triton.language as tl


@triton.jit
def _cells(block: int, rows: int, columns: int, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """(N,) rows and columns of the cells of a block, and which of them there are."""
    across = tl.cdiv(columns, COLUMNS)
    lane = tl.arange(0, ROWS * COLUMNS)
    row = block // across * ROWS + lane // COLUMNS
    column = block % across * COLUMNS + lane % COLUMNS
    return row, column, (row < rows) & (column < columns)


@triton.jit
def _mixed(
    padded: tl.pointer_type, weights: tl.pointer_type, shifts: tl.pointer_type, f_F: tl.tensor, at_N: tl.tensor,
    there_N: tl.tensor, inner: int, bottleneck: int, taps: int, plane: int,
) -> tl.tensor:  # fmt: skip
    """(F, N) sums over taps. Channels follow each other pass by pass, each pass with taps of its own.

    Args:
        padded, weights, shifts: of the sample; (inner, taps); (passes, taps), how far a tap lies from ``at_N``.
        f_F, inner: channels of m that are wanted, and how many there are; of padded ones there are ``bottleneck``.
        at_N, there_N: where the cells' north-western corners lie in a padded ``plane``, and which there are.
    """
    known_F = f_F < inner
    there_FN = known_F[:, None] & there_N[None, :]
    at_FN = (f_F % bottleneck * plane)[:, None] + at_N[None, :]
    total_FN = tl.zeros([f_F.shape[0], at_N.shape[0]], tl.float32)
    for tap in range(taps):
        weight_F = tl.load(weights + f_F * taps + tap, known_F, 0.0)
        shift_F = tl.load(shifts + f_F // bottleneck * taps + tap, known_F, 0)
        looked_FN = tl.load(padded + (at_FN + shift_F[:, None]), there_FN, 0.0)
        total_FN += weight_F[:, None] * looked_FN.to(tl.float32)
    return total_FN


@triton.jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """Beyond 40 it is 1 to the last bit, and exp overflows; what is no number stays none."""
    e = tl.exp(-2 * tl.clamp(x, -40.0, 40.0, tl.PropagateNan.ALL))
    return (1 - e) / (1 + e)


@triton.jit
def _rows_of(first: int, channels: int, CHANNELS: tl.constexpr) -> tl.tensor:
    """(R,) the rows of the expansion that some channels have, the four of a channel one after the other; which there
    are."""
    lane = tl.arange(0, 4 * CHANNELS)
    channel = first + lane // 4
    return lane % 4 * channels + channel, channel < channels


@triton.jit
def _expansion(
    expansion: tl.pointer_type, row_R: tl.tensor, known_R: tl.tensor, f_F: tl.tensor, inner: int
) -> tl.tensor:
    """(R, F) the weights of some rows."""
    return tl.load(expansion + (row_R[:, None] * inner + f_F[None, :]), known_R[:, None] & (f_F < inner)[None, :], 0.0)


@triton.jit
def _pre_activations(
    weight_RF: tl.tensor, mixed_FN: tl.tensor, bias: tl.pointer_type, row_R: tl.tensor, known_R: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(C, N) of i, f, g and o."""
    a_RN = tl.dot(weight_RF, mixed_FN, input_precision=PRECISION) + tl.load(bias + row_R, known_R, 0.0)[:, None]
    a_CN22 = tl.permute(tl.reshape(a_RN, [a_RN.shape[0] // 4, 2, 2, a_RN.shape[1]]), 0, 3, 1, 2)
    i_and_g, f_and_o = tl.split(a_CN22)
    i, g = tl.split(i_and_g)
    f, o = tl.split(f_and_o)
    return i, f, g, o


@triton.jit
def _together(i: tl.tensor, f: tl.tensor, g: tl.tensor, o: tl.tensor) -> tl.tensor:
    """(R, N), each (C, N) given."""
    a_CN22 = tl.join(tl.join(i, g), tl.join(f, o))
    return tl.reshape(tl.permute(a_CN22, 0, 2, 3, 1), [4 * i.shape[0], i.shape[1]])


@triton.jit
def _peepholes(peephole: tl.pointer_type, c_C: tl.tensor, channels: int) -> tl.tensor:
    """(C, 1) of i, f and o."""
    known = c_C < channels
    i = tl.load(peephole + c_C, known, 0.0)
    f = tl.load(peephole + channels + c_C, known, 0.0)
    o = tl.load(peephole + 2 * channels + c_C, known, 0.0)
    return i[:, None], f[:, None], o[:, None]


@triton.jit
def advance(
    h: tl.pointer_type, after: tl.pointer_type, padded: tl.pointer_type, weights: tl.pointer_type,
    shifts: tl.pointer_type, c: tl.pointer_type, expansion: tl.pointer_type, bias: tl.pointer_type,
    peephole: tl.pointer_type, h_batch: int, after_batch: int, c_batch: int, cells: int, padded_batch: int, rows: int,
    columns: int, padded_columns: int, plane: int, channels: int, inner: int, bottleneck: int, taps: int,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """h and the new c of some rows of a tile of so many ``cells``. A program has a block of a sample, and all of its
    channels."""
    sample = tl.program_id(1).to(tl.int64)
    row_N, column_N, there_N = _cells(tl.program_id(0), rows, columns, ROWS, COLUMNS)
    cell_N, at_N, f_F = row_N * columns + column_N, row_N * padded_columns + column_N, tl.arange(0, INNER)
    padded += sample * padded_batch
    weights += sample * inner * taps
    mixed_FN = _mixed(padded, weights, shifts, f_F, at_N, there_N, inner, bottleneck, taps, plane)
    mixed_FN = mixed_FN.to(expansion.dtype.element_ty)
    for first in range(0, channels, CHANNELS):
        c_C = first + tl.arange(0, CHANNELS)
        there_CN = (c_C < channels)[:, None] & there_N[None, :]
        at_CN = c_C[:, None] * cells + cell_N[None, :]
        row_R, known_R = _rows_of(first, channels, CHANNELS)
        weight_RF = _expansion(expansion, row_R, known_R, f_F, inner)
        i, f, g, o = _pre_activations(weight_RF, mixed_FN, bias, row_R, known_R, PRECISION)
        p_i, p_f, p_o = _peepholes(peephole, c_C, channels)
        before = tl.load(c + sample * c_batch + at_CN, there_CN, 0.0)
        c_new = _sigmoid(f + p_f * before) * before + _sigmoid(i + p_i * before) * _tanh(g)
        tl.store(after + sample * after_batch + at_CN, c_new, there_CN)
        tl.store(h + sample * h_batch + at_CN, _sigmoid(o + p_o * c_new) * _tanh(c_new), there_CN)


@triton.jit
def _gate_gradients(
    i: tl.tensor, f: tl.tensor, g: tl.tensor, o: tl.tensor, before: tl.tensor, p_i: tl.tensor, p_f: tl.tensor,
    p_o: tl.tensor, d_h: tl.tensor, d_c: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """The gradients of pre-activations and of the old c, from those of h and of the new c; and the new c."""
    i, f, g = _sigmoid(i + p_i * before), _sigmoid(f + p_f * before), _tanh(g)
    after = f * before + i * g
    o, squashed = _sigmoid(o + p_o * after), _tanh(after)
    d_o = d_h * squashed * o * (1 - o)
    d_c = d_c + d_h * o * (1 - squashed * squashed) + d_o * p_o
    d_i, d_f, d_g = d_c * g * i * (1 - i), d_c * before * f * (1 - f), d_c * i * (1 - g * g)
    return d_i, d_f, d_g, d_o, d_c * f + d_i * p_i + d_f * p_f, after


@triton.jit
def retreat(
    grad_mixed: tl.pointer_type, grad_before: tl.pointer_type, grad_h: tl.pointer_type, grad_after: tl.pointer_type,
    padded: tl.pointer_type, weights: tl.pointer_type, shifts: tl.pointer_type, c: tl.pointer_type,
    expansion: tl.pointer_type, bias: tl.pointer_type, peephole: tl.pointer_type, grad_mixed_batch: int,
    grad_mixed_channel: int, grad_mixed_row: int, before_batch: int, grad_h_batch: int, grad_after_batch: int,
    c_batch: int, cells: int, padded_batch: int, rows: int, columns: int, padded_columns: int, plane: int,
    channels: int, inner: int, bottleneck: int, taps: int, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """The gradients of m and of the old c, in some rows of a tile of so many ``cells``. A program has a block of a
    sample, and all of its channels."""
    sample = tl.program_id(1).to(tl.int64)
    row_N, column_N, there_N = _cells(tl.program_id(0), rows, columns, ROWS, COLUMNS)
    cell_N, at_N, f_F = row_N * columns + column_N, row_N * padded_columns + column_N, tl.arange(0, INNER)
    padded += sample * padded_batch
    weights += sample * inner * taps
    mixed_FN = _mixed(padded, weights, shifts, f_F, at_N, there_N, inner, bottleneck, taps, plane)
    mixed_FN = mixed_FN.to(expansion.dtype.element_ty)
    total_FN = tl.zeros([INNER, ROWS * COLUMNS], tl.float32)
    for first in range(0, channels, CHANNELS):
        c_C = first + tl.arange(0, CHANNELS)
        there_CN = (c_C < channels)[:, None] & there_N[None, :]
        at_CN = c_C[:, None] * cells + cell_N[None, :]
        row_R, known_R = _rows_of(first, channels, CHANNELS)
        weight_RF = _expansion(expansion, row_R, known_R, f_F, inner)
        i, f, g, o = _pre_activations(weight_RF, mixed_FN, bias, row_R, known_R, PRECISION)
        p_i, p_f, p_o = _peepholes(peephole, c_C, channels)
        before = tl.load(c + sample * c_batch + at_CN, there_CN, 0.0)
        d_h = tl.load(grad_h + sample * grad_h_batch + at_CN, there_CN, 0.0).to(tl.float32)
        d_c = tl.load(grad_after + sample * grad_after_batch + at_CN, there_CN, 0.0)
        i, f, g, o, d_before, _ = _gate_gradients(i, f, g, o, before, p_i, p_f, p_o, d_h, d_c)
        tl.store(grad_before + sample * before_batch + at_CN, d_before, there_CN)
        d_RN = _together(i, f, g, o).to(weight_RF.dtype)
        total_FN = tl.dot(tl.trans(weight_RF), d_RN, total_FN, input_precision=PRECISION)
    into_FN = (f_F * grad_mixed_channel)[:, None] + (row_N * grad_mixed_row + column_N)[None, :]
    tl.store(grad_mixed + sample * grad_mixed_batch + into_FN, total_FN, (f_F < inner)[:, None] & there_N[None, :])


@triton.jit
def retreat_weights(
    products: tl.pointer_type, sums: tl.pointer_type, grad_h: tl.pointer_type, grad_after: tl.pointer_type,
    padded: tl.pointer_type, weights: tl.pointer_type, shifts: tl.pointer_type, c: tl.pointer_type,
    expansion: tl.pointer_type, bias: tl.pointer_type, peephole: tl.pointer_type, grad_h_batch: int,
    grad_after_batch: int, c_batch: int, cells: int, padded_batch: int, batch: int, rows: int, columns: int,
    padded_columns: int, plane: int, channels: int, inner: int, bottleneck: int, taps: int, LEARNS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Parts of the gradients of the expansion, if it ``LEARNS``, and of biases and peepholes, 7 for each channel. A
    program has some channels of every so many-th block of all samples."""
    first, part, parts = tl.program_id(0) * CHANNELS, tl.program_id(1), tl.num_programs(1)
    f_F, c_C = tl.arange(0, INNER), first + tl.arange(0, CHANNELS)
    row_R, known_R = _rows_of(first, channels, CHANNELS)
    weight_RF = _expansion(expansion, row_R, known_R, f_F, inner)
    p_i, p_f, p_o = _peepholes(peephole, c_C, channels)
    of_RF, sum_R = tl.zeros([4 * CHANNELS, INNER], tl.float32), tl.zeros([4 * CHANNELS], tl.float32)
    sum_i = tl.zeros([CHANNELS], tl.float32)
    sum_f, sum_o = sum_i, sum_i
    blocks = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
    for block in range(part, blocks * batch, parts):
        sample = (block // blocks).to(tl.int64)
        row_N, column_N, there_N = _cells(block % blocks, rows, columns, ROWS, COLUMNS)
        at_N, there_CN = row_N * padded_columns + column_N, (c_C < channels)[:, None] & there_N[None, :]
        at_CN = c_C[:, None] * cells + (row_N * columns + column_N)[None, :]
        mixed_FN = _mixed(padded + sample * padded_batch, weights + sample * inner * taps, shifts, f_F, at_N, there_N,
                          inner, bottleneck, taps, plane).to(expansion.dtype.element_ty)  # fmt: skip
        i, f, g, o = _pre_activations(weight_RF, mixed_FN, bias, row_R, known_R, PRECISION)
        before = tl.load(c + sample * c_batch + at_CN, there_CN, 0.0)
        d_h = tl.load(grad_h + sample * grad_h_batch + at_CN, there_CN, 0.0).to(tl.float32)
        d_c = tl.load(grad_after + sample * grad_after_batch + at_CN, there_CN, 0.0)
        i, f, g, o, _, after = _gate_gradients(i, f, g, o, before, p_i, p_f, p_o, d_h, d_c)
        sum_i += tl.sum(i * before, 1)
        sum_f += tl.sum(f * before, 1)
        sum_o += tl.sum(o * after, 1)
        d_RN = _together(i, f, g, o)
        sum_R += tl.sum(d_RN, 1)
        if LEARNS:
            of_RF = tl.dot(d_RN.to(weight_RF.dtype), tl.trans(mixed_FN), of_RF, input_precision=PRECISION)
    if LEARNS:
        into_RF = row_R[:, None] * inner + f_F[None, :]
        tl.store(products + part * 4 * channels * inner + into_RF, of_RF, known_R[:, None] & (f_F < inner)[None, :])
    sums += part * 7 * channels
    tl.store(sums + row_R, sum_R, known_R)
    tl.store(sums + 4 * channels + c_C, sum_i, c_C < channels)
    tl.store(sums + 5 * channels + c_C, sum_f, c_C < channels)
    tl.store(sums + 6 * channels + c_C, sum_o, c_C < channels)


@triton.jit
def mix(
    into: tl.pointer_type, padded: tl.pointer_type, weights: tl.pointer_type, shifts: tl.pointer_type, into_batch: int,
    into_plane: int, padded_batch: int, rows: int, columns: int, padded_columns: int, plane: int, channels: int,
    taps: int, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """Sums over taps of one pass. A program has some channels of a block of a sample."""
    sample = tl.program_id(1).to(tl.int64)
    row_N, column_N, there_N = _cells(tl.program_id(0), rows, columns, ROWS, COLUMNS)
    c_C, at_N = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS), row_N * padded_columns + column_N
    padded += sample * padded_batch
    weights += sample * channels * taps
    total_CN = _mixed(padded, weights, shifts, c_C, at_N, there_N, channels, channels, taps, plane)
    at_CN = c_C[:, None] * into_plane + (row_N * columns + column_N)[None, :]
    tl.store(into + sample * into_batch + at_CN, total_CN, (c_C < channels)[:, None] & there_N[None, :])


@triton.jit
def mix_weights(
    products: tl.pointer_type, padded: tl.pointer_type, grad: tl.pointer_type, shifts: tl.pointer_type,
    padded_batch: int, grad_batch: int, grad_channel: int, grad_row: int, rows: int, columns: int, padded_columns: int,
    plane: int, channels: int, taps: int, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr,
) -> None:  # fmt: skip
    """Parts of the gradients of the taps' weights. A program has every so many-th block of a channel of a sample."""
    pair, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    sample, channel = (pair // channels).to(tl.int64), (pair % channels).to(tl.int64)
    padded += sample * padded_batch + channel * plane
    grad += sample * grad_batch + channel * grad_channel
    tap_K = tl.arange(0, TAPS)
    shift_K, total_K = tl.load(shifts + tap_K, tap_K < taps, 0), tl.zeros([TAPS], tl.float32)
    for block in range(part, tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS), parts):
        row_N, column_N, there_N = _cells(block, rows, columns, ROWS, COLUMNS)
        value_N = tl.load(grad + row_N * grad_row + column_N, there_N, 0.0).to(tl.float32)
        at_KN = shift_K[:, None] + (row_N * padded_columns + column_N)[None, :]
        looked_KN = tl.load(padded + at_KN, (tap_K < taps)[:, None] & there_N[None, :], 0.0).to(tl.float32)
        total_K += tl.sum(looked_KN * value_N[None, :], 1)
    tl.store(products + (part * tl.num_programs(0) + pair) * taps + tap_K, total_K, tap_K < taps)
