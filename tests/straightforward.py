"""What the evaluation computes, in plain float64 and with nothing of the package: what it is held against."""

import copy
import math

import numpy as np
import torch


def straightforward(model, windows, reference=None):
    """Per prediction, in plain float64: nll, top1, and against a reference kl, reference_nll, reference_top1."""
    records = []
    for window in windows.tolist():
        distributions = []
        for network in (model, reference) if reference is not None else (model,):
            with torch.no_grad():
                logits = copy.deepcopy(network).double()(torch.tensor([window])).logits[0].numpy()
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            distributions.append(weights / weights.sum(axis=1, keepdims=True))
        rows = []
        for place, token in enumerate(window[1:]):
            ours = distributions[0][place]
            row = [-math.log(ours[token]), int(np.argmax(ours))]
            if reference is not None:
                theirs = distributions[1][place]
                kl = sum(p * math.log(p / q) for p, q in zip(theirs.tolist(), ours.tolist(), strict=True))
                row += [kl, -math.log(theirs[token]), int(np.argmax(theirs))]
            rows.append(row)
        records.append(rows)
    return np.array(records)
