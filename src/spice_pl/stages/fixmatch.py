"""Stage 3: encoder and head trained jointly on reliable pseudo-labels.

Niu et al. 2022 (SPICE), Section III-C; Sohn et al. 2020 (FixMatch).
"""

from __future__ import annotations

from spice_pl.stages.semi import SemiSupervisedModule


class ReliableFixMatchModule(SemiSupervisedModule):
    """Learn the reliable labels of stage 2, and the same cluster for both views of every image.

    This is `SemiSupervisedModule` with the selector `reliable_labels` and a `FixedThreshold`, as
    conf/stage/fixmatch.yaml builds it. Its equations and where they are computed:

    - Eq. 6, agreement r_i, the share of the N_s nearest images that are in the cluster of image i:
      `functional.reliability.local_consistency`.
    - Eq. 7, reliable images, r_i ≥ λ and, as in the authors' code, max p above a confidence:
      `functional.reliability.select_reliable`. Their labels never change.
    - Eq. 8, label y_u of an unlabelled image, argmax p of the weak view if max p ≥ η:
      `nn.thresholds.FixedThreshold` weighs it 1 or 0, `training_step` takes the argmax.
    - Eq. 9, joint loss, cross-entropy of the reliable images in the weak view, and λ_u times that
      of all images in the strong view with y_u: `training_step`, with
      `functional.consistency.weighted_cross_entropy` for the second term.

    N_s, λ and the confidence are the settings `reliable.*`, η is `fixmatch.module.threshold`, λ_u
    is `fixmatch.module.unlabeled_weight`.
    """

    name = "fixmatch"
