"""Methods that steer: vectors that are added, directions that are taken out, features that are clamped.

Most of them are computed and not trained, see `Adapter.from_tensors`. Sources of the formulas:

- adding a vector: Turner et al. 2023, arXiv 2308.10248 (ActAdd); Rimsky et al. 2023, arXiv 2312.06681 (CAA);
  Zou et al. 2023, arXiv 2310.01405 (RepE, its operator linear_comb); Cao et al. 2024 (BiPO), which trains it
- a vector for each attention head: Yin et al. 2024, arXiv 2406.01563 (LoFiT, its second step)
- ablation, and ablation and addition: the package steering-vectors 0.12, `ablation_operator`
- clamping a concept's direction, or adding it below a threshold: Wu et al. 2025, arXiv 2501.17148 (AxBench);
  replacing one concept by another: the package EasySteer, `concept_replace`
- clamping a feature of a sparse autoencoder: AxBench, with the ReLU and JumpReLU encoders of SAELens
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.schema import Act
from ..pool import Fold
from ..sites import HEAD_SITE
from .method import Method, Options, Parameters, number, word
from .orthonormal import orthonormal_rows, orthonormality_error


class Vector(Method):
    """add: h + Σᵢ coefficientᵢ vᵢ; piecewise: h + Σᵢ coefficientᵢ sign(vᵢ h) vᵢ, where the sign of 0 is −1

    piecewise is RepE's operator piecewise_linear, which leaves h alone where vᵢ h is 0 exactly.
    """

    shapes = {"v": "rd", "coefficient": "r"}
    fixed = frozenset({"coefficient"})
    options = {"mode": word("add", "piecewise"), "coefficient": number(1.0)}
    rank = 1

    def init(
        self, name: str, tensor: Tensor, width: int, options: Options, generator: torch.Generator | None
    ) -> None:
        tensor.zero_()

    def stored(self, options: Options) -> dict:
        kept = super().stored(options)
        if kept["mode"] == "add":  # what folders without a mode mean
            del kept["mode"]
        return kept

    def fold(self, p: Parameters, act: Act, options: Options) -> Fold:
        v, coefficient = p["v"], p["coefficient"]
        if options.get("mode", "add") == "add":
            return self.rows(None, v, coefficient)
        twice = self.rows(v, 2 * coefficient[:, None] * v, torch.zeros_like(coefficient), Act.STEP)
        return self.joined(twice, self.rows(None, v, -coefficient))


class LoFiT(Method):
    """z + v, z the output of one attention head"""

    shapes = {"v": "rd"}
    sites = (HEAD_SITE,)
    rank = 1

    def init(
        self, name: str, tensor: Tensor, width: int, options: Options, generator: torch.Generator | None
    ) -> None:
        tensor.normal_(0, 1e-3, generator=generator)

    def fold(self, p: Parameters, act: Act, options: Options) -> Fold:
        return self.rows(None, p["v"], torch.ones_like(p["v"][:, 0]))


class Ablation(Method):
    """h − Σᵢ alphaᵢ uᵢ uᵢᵀ h + Σᵢ addᵢ vᵢ, where the uᵢ are the vᵢ made orthonormal in their order"""

    shapes = {"v": "rd", "alpha": "r", "add": "r"}
    fixed = frozenset({"alpha", "add"})
    optional = frozenset({"add"})
    options = {"alpha": number(1.0), "add": number(0.0)}
    separable = False  # a direction is taken out but for what those before it took
    rank = 1

    def has(self, name: str, options: Options) -> bool:
        return options["add"] != 0

    def init(
        self, name: str, tensor: Tensor, width: int, options: Options, generator: torch.Generator | None
    ) -> None:
        tensor.normal_(0, 1 / math.sqrt(width), generator=generator)

    def fold(self, p: Parameters, act: Act, options: Options) -> Fold:
        u = orthonormal_rows(p["v"])
        # Σ addᵢ vᵢ lies in the span of the uᵢ.
        c = u @ (p["add"] @ p["v"]) if "add" in p else torch.zeros_like(p["alpha"])
        return self.rows(-p["alpha"][:, None] * u, u, c)

    def check(self, p: Parameters, act: Act, options: Options) -> None:
        if not bool(p["v"].isfinite().all()):
            return  # a damaged file is warned of, not refused
        try:
            u = orthonormal_rows(p["v"].detach())
        except torch.linalg.LinAlgError:
            u = None
        if u is None or not orthonormality_error(u) < 1e-3:
            raise ValueError("v: its rows must be linearly independent, as they span what is taken out")


class Sae(Method):
    """Clamps features a of a sparse autoencoder to a target, along w_dec:

    clamp: h + Σᵢ (targetᵢ − aᵢ) w_decᵢ; minimum: h + Σᵢ (max(aᵢ, targetᵢ) − aᵢ) w_decᵢ, targetᵢ ≥ 0

    With z = w_enc h + b_enc, a is relu(z); with a threshold θ (JumpReLU) it is relu(z) where z > θ, else 0,
    so that a negative θ is as 0.
    """

    shapes = {"w_enc": "rd", "b_enc": "r", "w_dec": "rd", "target": "r", "threshold": "r"}
    fixed = frozenset({"target"})
    optional = frozenset({"threshold"})
    options = {"mode": word("clamp", "minimum"), "target": number(0.0)}
    trainable = False
    rank = 1

    def fold(self, p: Parameters, act: Act, options: Options) -> Fold:
        enc, dec, b, target = p["w_enc"], p["w_dec"], p["b_enc"], p["target"]
        theta = p["threshold"].clamp_min(0) if "threshold" in p else None
        clamp = options["mode"] == "clamp"
        if theta is None and clamp:
            return self.joined(self.rows(enc, -dec, b, Act.RELU), self.rows(None, dec, target))
        if theta is None:
            # max(a, t) − a = relu(t − z) − relu(−z), where a = relu(z) and t ≥ 0.
            return self.joined(
                self.rows(-enc, dec, target - b, Act.RELU), self.rows(-enc, -dec, -b, Act.RELU)
            )
        on = self.rows(enc, dec, b - theta, Act.STEP)  # 1 where z > θ, as 0 is no step
        if clamp:
            # a = relu(z − θ) + θ step(z − θ)
            above = self.rows(enc, -dec, b - theta, Act.RELU)
            return self.joined(above, _times(on, -theta), self.rows(None, dec, target))
        # max(a, t) − a is t where z ≤ θ, and relu(t − z) above:
        # relu(max(t, θ) − z) − relu(θ − z) + min(t, θ) (1 − step(z − θ))
        below = torch.minimum(target, theta)
        return self.joined(
            self.rows(-enc, dec, torch.maximum(target, theta) - b, Act.RELU),
            self.rows(-enc, -dec, theta - b, Act.RELU),
            self.rows(None, dec, below),
            _times(on, -below),
        )

    def check(self, p: Parameters, act: Act, options: Options) -> None:
        if options["mode"] == "minimum" and bool((p["target"] < 0).any()):
            raise ValueError(
                f'target: must be 0 or more with mode "minimum", as activations are; was '
                f"{p['target'].min().item():g}"
            )


def _times(fold: Fold, factors: Tensor) -> Fold:
    """The edit of each row times a factor of its own, [r]."""
    return fold._replace(up=factors[:, None] * fold.up)


class Concept(Method):
    """Directions w of concepts, used as they are stored:

    clamp: h + Σᵢ (valueᵢ − relu(wᵢ h)) wᵢ; add: h + Σᵢ valueᵢ wᵢ (ReFT-r1's steering, value = its largest
    activation times a factor); replace: h + Σᵢ (wᵢ h / ‖wᵢ‖²) (otherᵢ − wᵢ); threshold: valueᵢ wᵢ is added
    where wᵢ h < valueᵢ
    """

    shapes = {"w": "rd", "other": "rd", "value": "r"}
    optional = frozenset({"other", "value"})
    fixed = frozenset({"value"})
    options = {"mode": word("clamp", "add", "replace", "threshold"), "value": number(0.0)}
    rank = 1

    def has(self, name: str, options: Options) -> bool:
        return (name == "other") == (options["mode"] == "replace")

    def fold(self, p: Parameters, act: Act, options: Options) -> Fold:
        w = p["w"]
        if options["mode"] == "replace":
            return self.rows(w / w.square().sum(1, keepdim=True), p["other"] - w, torch.zeros_like(w[:, 0]))
        value = p["value"]
        if options["mode"] == "threshold":
            return self.rows(-w, value[:, None] * w, value, Act.STEP)
        added = self.rows(None, w, value)
        if options["mode"] == "add":
            return added
        return self.joined(self.rows(w, -w, torch.zeros_like(value), Act.RELU), added)

    def check(self, p: Parameters, act: Act, options: Options) -> None:
        mode = options["mode"]
        wanted = "other" if mode == "replace" else "value"
        if wanted not in p or len(p) > 2:
            raise ValueError(f'{wanted}: mode "{mode}" takes w and {wanted}, was given {", ".join(p)}')
        if mode == "replace" and not bool(p["w"].any(dim=1).all()):
            raise ValueError('w: mode "replace" divides by the length of each row, and one is zero')
