"""How much a model's predictions suffer from coding each matrix, when errors are fed back: what mixed precision goes by.

Feedback leaves of a row's error d what the inputs' product H has in it after elimination: with H = M S M', M upper triangular
with ones on its diagonal, d H d' is the sum over columns j of S_j e_j^2, e the code's own error on its targets. That is a share
`nmse` of the row's energy in every column, so with g_r the gradient at output r (`statistics`)

    KL  =  sensitivity * nmse,     sensitivity  =  1/2 sum over rows r of  E[g_r^2] mean(W_r^2) * sum over columns of S_j

Of steps of several columns S_j is a block, whose trace counts. Without feedback it would be the trace of H in place of that of
S (`sensitivity`), which says too much of layers whose inputs are correlated. H is taken in the format's own basis: where that
is transformed, the transform has spread out what is large.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from seedlm.codes import hadamard
from seedlm.codes.base import Format
from seedlm.errors import SourceError
from seedlm.storage.selection import NO_SURVEY, Survey, matrices_of
from seedlm.storage.source import Source
from seedlm.storage.statistics import Statistics

_DAMPING = 0.01


def sensitivities(
    statistics: Statistics,
    shapes: Mapping[str, tuple[int, int]],
    source: Source,
    format: Format,
    survey: Survey = NO_SURVEY,
) -> dict[str, float]:
    """Module -> KL in nats a token, per unit of relative squared error of its code.

    shapes   of the modules to be compressed, each of a stack of experts under a name of its own
    format   in whose basis and steps errors are fed back, of all that a mixture chooses from
    survey   what the model's class says of the source, which stacks among it
    Six digits; 0 for a layer that was not observed or that no token reached (`allocate` takes it as the least of the others).
    Raises SourceError if the statistics have no gradients.
    """
    if not statistics.rows:
        raise SourceError("these statistics have no gradients; measure them again, or give --sensitivity FILE")
    held = {name.removesuffix(".weight") for name in source.tensors}
    stacks = {module.rpartition(".")[0] for module in shapes if module not in held}
    tensors = matrices_of({*shapes, *stacks}, source.tensors, source.config, survey)
    left: dict[str, float] = {}
    found = {}
    for module, (rows, columns) in shapes.items():
        name, squares = statistics.reads.get(module), statistics.rows.get(module)
        if name is None or squares is None:
            found[module] = 0.0
            continue
        if name not in left:
            left[name] = after_elimination(statistics.inputs[name].product(), format)
        tensor, _, stack = tensors[module]
        if stack is None:
            weight = source.rows(tensor, 0, rows).float()
        else:
            weight = source.rows(tensor, *stack.span(stack.expert(module))).view(stack.shape[1:]).float()
            weight = weight.T if stack.transposed else weight
        energy = weight.square().sum(1).double() / columns
        value = 0.5 * float((squares.double() * energy).sum()) * left[name]
        found[module] = float(f"{value:.6g}") if math.isfinite(value) else 0.0
    return found


def after_elimination(product: Tensor, format: Format) -> float:
    """Sum of the pivots S of a product [in, in], damped, in a format's basis; of steps of several columns the trace of S."""
    rotated = product.double()
    if format.transform > 1:
        rotated = hadamard.forward(hadamard.forward(rotated, format.transform).T.contiguous(), format.transform)
    mean = float(rotated.diagonal().mean())
    if not mean > 0:
        return 0.0
    damped = rotated + torch.eye(len(rotated), dtype=torch.float64) * (mean * _DAMPING)
    factor = torch.linalg.cholesky(damped.flip(0, 1))
    block = torch.arange(len(factor)).flip(0) // format.column_step
    return float(factor[block[:, None] == block].square().sum())
