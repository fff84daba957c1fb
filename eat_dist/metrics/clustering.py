"""How well clusters fit the classes: NMI, AMI, pairwise F1.

Legend: N samples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

Labels = npt.ArrayLike | torch.Tensor


def nmi(labels: Labels, clusters: Labels) -> float:
    """Normalised mutual information, 2·I(Y; C) / (H(Y) + H(C)) in [0, 1] (Manning et al. 2008, section 16.3).

    Args:
        labels: [N] true classes.
        clusters: [N] found clusters; their numbers do not matter.
    """
    return float(normalized_mutual_info_score(_array(labels), _array(clusters), average_method="arithmetic"))


def ami(labels: Labels, clusters: Labels) -> float:
    """Adjusted mutual information (Vinh, Epps & Bailey 2010): (I − E[I]) / ((H(Y) + H(C))/2 − E[I]).

    Unlike NMI it is 0 in the mean for a random clustering, whatever the number of clusters. It may be < 0.
    """
    return float(adjusted_mutual_info_score(_array(labels), _array(clusters), average_method="arithmetic"))


def pairwise_f1(labels: Labels, clusters: Labels) -> float:
    """F1 of the decisions "same cluster" over all pairs of samples (Manning et al. 2008, section 16.3).

    The clustering figure of deep metric learning beside NMI since Song et al. 2016. With n_yc samples of
    class y in cluster c and the binomial (n over 2): TP = Σ_yc (n_yc over 2), TP + FN = Σ_y (n_y over 2), TP
    + FP = Σ_c (n_c over 2), F1 = 2·TP / ((TP + FP) + (TP + FN)), counted in integers without looking at any
    pair. 1 where neither side has a pair, since they agree then.
    """
    true, found = _array(labels), _array(clusters)
    if true.shape != found.shape:
        raise ValueError(f"labels and clusters must be of one length; got {true.shape} and {found.shape}")
    _, joint = np.unique(np.stack([true, found]), axis=1, return_counts=True)
    both = _pairs(joint)
    either = _pairs(np.unique(true, return_counts=True)[1]) + _pairs(np.unique(found, return_counts=True)[1])
    return 2 * both / either if either else 1.0


def _array(labels: Labels) -> npt.NDArray[np.int64]:
    return np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels, dtype=np.int64)


def _pairs(counts: npt.NDArray[np.int64]) -> int:
    return int((counts * (counts - 1) // 2).sum())
