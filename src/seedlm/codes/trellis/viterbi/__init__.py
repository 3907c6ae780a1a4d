"""The encoder's core: the cyclic streams whose values come nearest to some targets, by the Viterbi algorithm.

The same bits come out on every device, for any split of a batch: costs are integers (`cost`), ties go to the smallest bits.
"""

import torch
from torch import Tensor

from seedlm.codes.trellis import codec
from seedlm.codes.trellis.format import SEGMENT_ROWS, TrellisFormat
from seedlm.codes.trellis.viterbi import reference
from seedlm.codes.trellis.viterbi.cost import Seam
from seedlm.errors import TensorError

DEFAULT_SEAM = Seam()


def viterbi(targets: Tensor, valid: int, format: TrellisFormat, seam: Seam = DEFAULT_SEAM) -> tuple[Tensor, Tensor]:
    """Encode sequences: one per column and strip of a matrix.

    targets     float32 [N, T'], finite: transformed weights over their row's scale, in units of the state values
                (standard deviation about 148); T' a multiple of 32 from 32 up
    valid       rows from here on may take any value, 1 .. T'
    returns     words int32 [N, T' * R / 32] and their values int16 [N, T'], on the device of the targets
    """
    if targets.dtype != torch.float32 or targets.dim() != 2 or targets.shape[1] % SEGMENT_ROWS or not targets.shape[1]:
        raise TensorError(
            f"targets must be float32 [N, T'] with T' a multiple of {SEGMENT_ROWS}, got {targets.dtype} {tuple(targets.shape)}"
        )
    if not 1 <= valid <= targets.shape[1]:
        raise TensorError(f"valid rows must be 1 .. {targets.shape[1]}, got {valid}")
    words = codec.pack(reference.search(targets, valid, format.trellis, seam), format.rate)
    return words, codec.decode_streams(words, format.trellis)
