"""`mixing.mix` for a GPU: both products, norms and ReLUs in one kernel, and another for all gradients.

A program mixes one group of one query. It reads what was sampled and the group's two matrices once and writes the
result once; what the definition writes and reads again between its six steps stays on the chip. Gradients compute it
again from the inputs. Nothing is added by atomics: results are the same from run to run.

The matrices themselves come from memory. To make them inside, from the query and the weights of the layer that makes
them, would save writing and reading G*(C*C + O*P) numbers a query, but then every program must fetch its group's
weights, (C*C + O*P) rows as long as a query, and only the queries that it serves at once share them. A program holds
P*C numbers a query of a group: at most 16 queries of 32*64 fit into the registers of a multiprocessor. For 600 queries
of 256 numbers, 4 groups, C 64, O and P 32, in 16 bits: 49 MB written and read each layer are saved, 38 * 10.5 = 398 MB
of weights are fetched (from the cache at best). So that product is left to the library, which shares a fetch among 128
queries or more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_EPS = 1e-5  # of torch.nn.functional.layer_norm
_KINDS = torch.float32, torch.bfloat16, torch.float16


def fits(sampled: Tensor, matrices: Tensor, given: int) -> bool:
    """Whether the kernels can hold such a mixing on its GPU, of float32, or with half matrices, as autocast makes them.

    Gradients of the largest, in float32, take 96 kB of shared memory; GPUs before compute capability 8.0, and AMD's,
    have less.
    """
    p, c = sampled.shape[3:]
    small = c <= 64 and p <= 64 and given <= 128 and _block(p) * _block(given) <= 4096
    known = matrices.dtype in _KINDS and sampled.dtype == torch.float32
    return small and known and torch.version.hip is None and torch.cuda.get_device_capability(sampled.device) >= (8, 0)


def _block(size: int) -> int:
    """The edge of a block that holds it: a power of two, of which a product wants at least 16."""
    return max(16, triton.next_power_of_2(size))


def mix(sampled: Tensor, matrices: Tensor, given: int) -> Tensor:
    """`mixing.mix` after its checks.

    Equal to the definition but for rounding: sums are float32 (float64 for such inputs), in another order; under
    autocast what a product gives is not rounded to half before its norm. float32 goes through TF32 where PyTorch is
    told so too (`torch.set_float32_matmul_precision`).
    """
    return _Mix.apply(sampled, matrices, given)


class _Mix(torch.autograd.Function):
    """Keeps what it is given, and nothing of what it computes."""

    @staticmethod
    def forward(ctx, sampled: Tensor, matrices: Tensor, given: int) -> Tensor:
        sampled, matrices = sampled.contiguous(), matrices.contiguous()
        ctx.given = given
        ctx.save_for_backward(sampled, matrices)
        b, q, g, p, c = sampled.shape
        mixed = sampled.new_empty(b, q, g, given, c)  # float32 under autocast, as a norm gives there
        with torch.cuda.device_of(sampled):  # Triton launches on the current GPU, which need not be the tensors'
            _mix[(b * q * g,)](sampled, matrices, mixed, **_options(sampled, given))
        return mixed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        sampled, matrices = ctx.saved_tensors
        b, q, g, p, c = sampled.shape
        of_sampled, of_matrices = torch.empty_like(sampled), torch.empty_like(matrices)
        with torch.cuda.device_of(sampled):
            _mix_back[(b * q * g,)](
                sampled, matrices, gradient.contiguous(), of_sampled, of_matrices, **_options(sampled, ctx.given)
            )
        return of_sampled, of_matrices, None


def _options(sampled: Tensor, given: int) -> dict:
    sizes = dict(zip(("TAKEN", "GIVEN", "C"), (sampled.shape[3], given, sampled.shape[4])))
    blocks = {f"BLOCK_{name}": _block(size) for name, size in sizes.items()}
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return sizes | blocks | {"EPS": _EPS, "PRECISION": precision, "num_warps": 8}


@triton.jit
def _read(matrix, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """A matrix (ROWS, COLUMNS), zeros around it."""
    r, c = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_C)[None, :]
    return tl.load(matrix + r * COLUMNS + c, (r < ROWS) & (c < COLUMNS), other=0.0)


@triton.jit
def _write(matrix, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    r, c = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_C)[None, :]
    tl.store(matrix + r * COLUMNS + c, values.to(matrix.dtype.element_ty), (r < ROWS) & (c < COLUMNS))


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    if a.dtype == tl.float64:
        return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float64)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _normal(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EPS: tl.constexpr):
    """The norm of x over its ROWS and COLUMNS, zeros around it, and by how much it grew."""
    r, c = tl.arange(0, x.shape[0])[:, None], tl.arange(0, x.shape[1])[None, :]
    mean = tl.sum(tl.sum(x, 1), 0) / (ROWS * COLUMNS)  # x is zero around
    x = tl.where((r < ROWS) & (c < COLUMNS), x - mean, 0.0)
    growth = 1 / tl.sqrt(tl.sum(tl.sum(x * x, 1), 0) / (ROWS * COLUMNS) + EPS)
    return x * growth, growth


@triton.jit
def _relu(x):
    # not tl.maximum: of a number and NaN a GPU's takes the number, and what is wrong would look like an answer
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _normal_back(gradient, x, growth, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The gradient before a norm and its ReLU, from that after them and what the norm gave.

    Around, where x is zero, it says anything: all that it will meet there are zeros.
    """
    gradient = tl.where(x > 0, gradient, 0.0)
    mean = tl.sum(tl.sum(gradient, 1), 0) / (ROWS * COLUMNS)
    along = tl.sum(tl.sum(gradient * x, 1), 0) / (ROWS * COLUMNS)
    return growth * (gradient - mean - x * along)


@triton.jit
def _mix(
    sampled,  # (B, Q, G, P, C), of which TAKEN is P
    matrices,  # (B, Q, G, C*C + O*P)
    mixed,  # (B, Q, G, O, C), of which GIVEN is O
    TAKEN: tl.constexpr,
    GIVEN: tl.constexpr,
    C: tl.constexpr,
    BLOCK_TAKEN: tl.constexpr,
    BLOCK_GIVEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    half = matrices.dtype.element_ty
    matrices += program * (C * C + GIVEN * TAKEN)
    taken = _read(sampled + program * TAKEN * C, TAKEN, C, BLOCK_TAKEN, BLOCK_C).to(half)
    x = _product(taken, _read(matrices, C, C, BLOCK_C, BLOCK_C), PRECISION)
    x, _ = _normal(x, TAKEN, C, EPS)
    x = _relu(x).to(half)
    x = _product(_read(matrices + C * C, GIVEN, TAKEN, BLOCK_GIVEN, BLOCK_TAKEN), x, PRECISION)
    x, _ = _normal(x, GIVEN, C, EPS)
    _write(mixed + program * GIVEN * C, _relu(x), GIVEN, C, BLOCK_GIVEN, BLOCK_C)


@triton.jit
def _mix_back(
    sampled,
    matrices,
    gradient,  # of mixed
    of_sampled,
    of_matrices,
    TAKEN: tl.constexpr,
    GIVEN: tl.constexpr,
    C: tl.constexpr,
    BLOCK_TAKEN: tl.constexpr,
    BLOCK_GIVEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    half = matrices.dtype.element_ty
    matrices += program * (C * C + GIVEN * TAKEN)
    of_matrices += program * (C * C + GIVEN * TAKEN)
    # ---- forward again
    taken = _read(sampled + program * TAKEN * C, TAKEN, C, BLOCK_TAKEN, BLOCK_C).to(half)
    by_channel = _read(matrices, C, C, BLOCK_C, BLOCK_C)
    x, growth_x = _normal(_product(taken, by_channel, PRECISION), TAKEN, C, EPS)
    y = _relu(x).to(half)
    by_point = _read(matrices + C * C, GIVEN, TAKEN, BLOCK_GIVEN, BLOCK_TAKEN)
    z, growth_z = _normal(_product(by_point, y, PRECISION), GIVEN, C, EPS)
    # ---- and back
    back = _read(gradient + program * GIVEN * C, GIVEN, C, BLOCK_GIVEN, BLOCK_C).to(z.dtype)
    back = _normal_back(back, z, growth_z, GIVEN, C).to(half)
    _write(of_matrices + C * C, _product(back, tl.trans(y), PRECISION), GIVEN, TAKEN, BLOCK_GIVEN, BLOCK_TAKEN)
    back = _product(tl.trans(by_point), back, PRECISION)
    back = _normal_back(back, x, growth_x, TAKEN, C).to(half)
    _write(of_matrices, _product(tl.trans(taken), back, PRECISION), C, C, BLOCK_C, BLOCK_C)
    _write(
        of_sampled + program * TAKEN * C,
        _product(back, tl.trans(by_channel), PRECISION),
        TAKEN,
        C,
        BLOCK_TAKEN,
        BLOCK_C,
    )
