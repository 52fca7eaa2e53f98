"""Diffusion-DPO: direct preference optimisation of denoisers (arXiv:2311.12908).

People prefer image w to image l of a prompt. The reward that would explain it, and the policy that
is best for it under a KL penalty, are one and the same, so that no reward model is needed:

    draw t and eps once for the pair,  x_t = corrupt(x_0, eps, t) of each image
    e = mean |network(x_t, t, prompt) - target|^2,  e_ref the same of the reference
    z = -(beta / 2) ((e_w - e_ref,w) - (e_l - e_ref,l))
    L = -log sigmoid(z)

At the start network = reference, z = 0 and L = log 2, whatever the data. `loss_type` puts another
loss of e and e_ref in the place of L: IPO, KTO, MaPO, SimPO-like and more, see
`lit_align.functional.preference`. Rankings are learned from by "rank" (arXiv:2410.18013), single
images that were liked or not by "kto" (arXiv:2404.04465).

Deviations:
    1. beta is that of the official code, which takes means over a latent's elements and halves;
       the paper's is beta_paper T = beta / (2 D) on sums over D elements.
    2. Latents are the means of the VAE's posteriors, not draws, so that they can be kept.
    3. Ties are refused unless the loss can read them; some published scripts train on them as if
       the first image had won.
    4. The reference runs in the precision of the trained network, so that z is exactly 0 at the
       start.
    5. DSPO's weight of doubt has no gradient; SmPO's inversion of images is left out.
"""

from __future__ import annotations

from lit_align.algorithms.preference_learning import PreferenceModule


class DiffusionDPO(PreferenceModule):
    """Learn from judged images, with the official code's values; see `PreferenceModule`.

    It trains networks that predict the noise, the velocity, or the clean sample. For flow matching,
    `FlowDPO` has the values that suit it.
    """
