"""`top_mask` in CUDA C++ (csrc/cuda/top_mask.cu): digits of 16 bits, 3 reads of float32 scores. Untimed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fillm_kernels import native
from fillm_kernels.cuda.calls import call, dtype_code
from fillm_kernels.top_mask import INTEGERS, first_nan

LARGEST = (1 << 63) - 1
STATE = 8  # words of a table before its tensors; as Selection of csrc/cuda/top_mask.h, and some


def launch(scores: Sequence[Tensor], budget: int) -> tuple[list[Tensor], Tensor]:
    """P entries each -> [ceil(P / 8)] each, scalar; the arguments are checked."""
    extension = native.cuda_extension()
    flat, device = [tensor.contiguous() for tensor in scores], scores[0].device
    fill = torch.empty if budget else torch.zeros
    bits = [fill(-(-tensor.numel() // 8), dtype=torch.uint8, device=device) for tensor in flat]
    first_pieces = [0]
    for tensor in flat:
        first_pieces.append(first_pieces[-1] + -(-tensor.numel() // extension.PIECE_SCORES))
    pieces = first_pieces[-1]
    rows = [[t.data_ptr(), t.numel(), b.data_ptr(), f] for t, b, f in zip(flat, bits, first_pieces, strict=False)]
    state = [budget, 0, 0, LARGEST] + [0] * (STATE - 4)
    table = torch.tensor([*state, *(word for row in rows for word in row), 0, 0, 0, pieces]).to(device)
    scratch = torch.zeros(extension.DIGIT_VALUES + pieces, dtype=torch.int64, device=device)
    call(
        extension.top_mask,
        table,
        tensors=table[STATE:].data_ptr(),
        count=len(flat),
        pieces=pieces,
        selection=table.data_ptr(),
        totals=scratch.data_ptr(),
        ties=scratch[extension.DIGIT_VALUES :].data_ptr(),
        dtype=dtype_code(flat[0]),
        count_only=budget == 0,
    )
    _, key, _, nan = table[:4].tolist()  # waits for the device
    if nan != LARGEST:
        raise first_nan(scores, nan)
    if budget == 0:
        return bits, torch.full((), torch.inf, dtype=flat[0].dtype, device=device)
    return bits, score_of(key, flat[0])


def score_of(key: int, scores: Tensor) -> Tensor:
    """The score of an unsigned key with the order of the scores, scalar, in their dtype."""
    width = 8 * scores.element_size()
    sign = 1 << (width - 1)
    key &= 2 * sign - 1
    stored = key ^ sign if key & sign else key ^ (2 * sign - 1)
    stored -= 2 * sign if stored & sign else 0
    return torch.tensor(stored, dtype=INTEGERS[scores.element_size()]).view(scores.dtype).to(scores.device)


def small_case(dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], int]:
    """Several tensors and pieces, a negative threshold and surplus ties in two of them, for the check at first use."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=generator, dtype=torch.float64).to(dtype)
    sizes = (77, 40_000, 0, 1234)
    return [values[torch.randint(64, (size,), generator=generator)].to(device) for size in sizes], 30_000
