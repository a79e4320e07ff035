"""pre_norm, the expand convolution and expand_norm around the Triton kernels: two ways of folding.

Both give the kernels a folded weight and bias, y1 = z1 scale + shift of the kernels' z1, and turn
the gradient of y1 into those of x and the parameters by small algebra. They differ in where the
statistics of expand_norm come from: the covariance of x (folding.py), so that z1 is y1 already, or
z1 itself, measured while it is written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from moat_kernels.ops.mbconv.algebra.affine import make_affine
from moat_kernels.ops.mbconv.algebra.folding import FOLDING_ROWS_PER_CHANNEL, FoldedExpand
from moat_kernels.ops.mbconv.description import MBConvDescription, MBConvParameters
from moat_kernels.ops.mbconv.triton.kernels.expand_backward import expand_input, expand_weight

# Rows whose mean the covariance is first taken around: enough to be within a fraction of the
# standard deviation of the mean of all.
PILOT_ROWS = 4096


class Expand(ABC):
    """One call's expand convolution with its norms. x: [N, C] rows, contiguous.

    rows: x in the dtype of the weight, [N, C], less its mean where that dtype is narrower.
    centre: what is left to subtract from rows, float32 [C].
    weight, bias: what rows go through, in the dtype of the weight and float32.
    complete: whether z1 is y1.
    affine: float32 [2, E], y1 = z1 scale + shift; None if complete.
    statistics: small tensors from which a later call of `restore` continues.

    The first call: `begin`, then `take_covariance` if it asks for that, then `take_moments` of z1,
    unless complete. A later one: `restore`.
    """

    rows: Tensor
    centre: Tensor
    weight: Tensor
    bias: Tensor
    affine: Tensor | None
    statistics: tuple[Tensor, ...]
    statistics_count = 4
    complete: bool

    @abstractmethod
    def restore(self, statistics: tuple[Tensor, ...]) -> None:
        """Take over what an earlier call measured."""

    @abstractmethod
    def begin(self) -> Tensor | None:
        """Set `rows` and what is known before they are measured.

        Returns about what [C] the covariance of rows is to be measured (kernels/covariance.py);
        None if it is not.
        """

    def take_covariance(self, offset: Tensor, covariance: Tensor) -> None:
        """Set weight and bias by the mean [C], less what `begin` gave, and covariance of rows."""
        raise RuntimeError(f"{type(self).__name__} asks for no covariance")

    @property
    @abstractmethod
    def measures(self) -> bool:
        """Whether the moments of z1 are to be measured while it is written."""

    @abstractmethod
    def take_moments(self, moments: tuple[Tensor, Tensor] | None) -> None:
        """Set `affine` by the mean and biased variance [E] of z1; None if not `measures`."""

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """What kernels/expand.py computes z1 from."""
        return self.rows, self.weight, self.bias

    @abstractmethod
    def moments(self) -> dict[str, tuple[Tensor, ...]]:
        """(mean, biased variance) of each norm that measured the batch, by name."""

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        z1: Tensor | None,
        total: Tensor,
        product: Tensor,
        addend: Tensor | None,
        needed: frozenset[str],
    ) -> dict[str, Tensor]:
        """Gradients by name, of "x" (plus addend [N, C]) and parameters, from that of y1.

        z1: complete ones do not need it. total, product: sums of grad and grad * z1, float64 [E].
        """


def make_expand(x: Tensor, parameters: MBConvParameters, description: MBConvDescription) -> Expand:
    """The expand convolution of x [N, C]; the norms are `frozen` where they do not measure."""
    norms = (description.pre_norm, description.expand_norm)
    measures = any(norm is not None and not norm.frozen for norm in norms)
    if measures and x.shape[0] < FOLDING_ROWS_PER_CHANNEL * x.shape[1]:
        return MeasuredExpand(x, parameters, description)
    return CovarianceExpand(x, parameters, description)


class CovarianceExpand(Expand):
    """Statistics by covariance, or none; see folding.py."""

    complete = True
    affine = None

    def __init__(
        self, x: Tensor, parameters: MBConvParameters, description: MBConvDescription
    ) -> None:
        self.x = x
        self.stage = FoldedExpand(parameters, description.pre_norm, description.expand_norm)
        # Mean and biased variance of x, float32 [C], for pre_norm's running ones where x is rounded
        # to rows.
        self.exact: tuple[Tensor, Tensor] | None = None

    def _shift(self, mean: Tensor | None) -> None:
        """Set `rows`: x, or what is left of it above that mean if x must be rounded."""
        self.rows = self.x
        if self.x.dtype != self.stage.weight.dtype:
            shifted = self.x if mean is None else self.x - mean
            self.rows = shifted.to(self.stage.weight.dtype)

    def begin(self) -> Tensor | None:
        if not self.stage.centred:
            self._shift(self.stage.fixed_mean)
            self.stage.statistics = tuple(
                self.x.new_empty(0, dtype=torch.float32) for _ in range(4)
            )
            self._fold()
            return None
        if self.stage.measures_pre and self.x.dtype == torch.float32 != self.stage.weight.dtype:
            variance, self.pilot = torch.var_mean(self.x, 0, correction=0)
            self.exact = (self.pilot, variance)
        else:
            step = max(1, self.x.shape[0] // PILOT_ROWS)
            self.pilot = self.x[::step].mean(0, dtype=torch.float32)
        self._shift(self.pilot)
        return torch.zeros_like(self.pilot) if self.rows is not self.x else self.pilot

    def take_covariance(self, offset: Tensor, covariance: Tensor) -> None:
        self.stage.take_moments(self.pilot, offset, covariance)
        self._fold()

    def restore(self, statistics: tuple[Tensor, ...]) -> None:
        self.stage.statistics = statistics
        self._shift(statistics[0] if self.stage.centred else self.stage.fixed_mean)
        self._fold()

    def _fold(self) -> None:
        self.statistics = self.stage.statistics
        weight, bias = self.stage.fold()
        self.weight = weight.to(self.stage.weight.dtype).contiguous()
        if self.stage.centred:
            pilot, offset = self.statistics[:2]
            self.centre = offset if self.rows is not self.x else pilot + offset
        elif self.stage.fixed_mean is not None and self.rows is self.x:
            self.centre = self.stage.fixed_mean
        else:
            self.centre, self.bias = weight.new_zeros(weight.shape[1]), bias
            return
        # By the rounded weight, so that a large mean cancels.
        self.bias = torch.addmv(bias, self.weight.float(), self.centre, alpha=-1)

    @property
    def measures(self) -> bool:
        return False

    def take_moments(self, moments: tuple[Tensor, Tensor] | None) -> None:
        """Nothing: z1 is y1."""

    def moments(self) -> dict[str, tuple[Tensor, ...]]:
        moments = self.stage.batch_moments()
        return moments if self.exact is None else moments | {"pre_norm": self.exact}

    def backward(
        self,
        grad: Tensor,
        z1: Tensor | None,
        total: Tensor,
        product: Tensor,
        addend: Tensor | None,
        needed: frozenset[str],
    ) -> dict[str, Tensor]:
        self.stage.needed = needed
        grad_folded = expand_weight(grad, None, None, self.rows, self.centre)
        grad_covariance = self.stage.parameter_gradients(grad_folded, total.float())
        gradients = self.stage.gradients
        if "x" in needed:
            correction, affine = None, None
            if grad_covariance is not None:
                correction, affine = self._correction(grad_covariance, total)
            gradients["x"] = expand_input(
                *(grad, None, None, self.weight, self.rows, correction, affine, addend),
                self.x.dtype,
            )
        return gradients

    def _correction(self, grad_covariance: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """2/N (rows - centre) dS less the mean of all that reaches x, as `expand_input` takes it.

        dS is scaled to about 1: float16 would lose its small elements.
        """
        count = self.x.shape[0]
        peak = grad_covariance.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        correction = (grad_covariance / peak).to(self.rows.dtype)
        slope = 2 / count * peak
        constant = (total.float() @ self.weight.float()) / -count
        constant = constant - slope * (self.centre @ correction.float())
        return correction, torch.stack((slope.expand_as(constant), constant))


class MeasuredExpand(Expand):
    """Statistics of x per channel, and of z1 = (x - mean(x)) W'^T from the kernel that writes it.

    For few rows per channel, where the C x C algebra outweighs passes over a small z1.
    """

    complete = False

    def __init__(
        self, x: Tensor, parameters: MBConvParameters, description: MBConvDescription
    ) -> None:
        self.x = x
        self.parameters = parameters
        self.norms = {name: getattr(description, name) for name in ("pre_norm", "expand_norm")}
        self.wide_weight = parameters.expand_weight.flatten(1)
        self.statistics = ()

    def _measures(self, name: str) -> bool:
        norm = self.norms[name]
        return norm is not None and not norm.frozen

    def restore(self, statistics: tuple[Tensor, ...]) -> None:
        self.statistics = statistics
        self._fold_pre()
        self._fold_expand()

    def _fold_pre(self) -> None:
        mean, variance = self.statistics[:2]
        self.pre = make_affine(
            *(self.norms["pre_norm"], self.parameters.pre_norm),
            *((torch.zeros_like(mean), variance), mean),
        )
        dtype = self.wide_weight.dtype
        self.weight = (self.wide_weight * self.pre.scale.float()).to(dtype).contiguous()
        self.rows, self.centre = self.x, mean
        if self.x.dtype != dtype:
            self.rows, self.centre = (self.x - mean).to(dtype), torch.zeros_like(mean)
        self.bias = -(self.weight.float() @ self.centre)

    def _fold_expand(self) -> None:
        mean, variance = self.statistics[2:]
        self.expand = make_affine(
            *(self.norms["expand_norm"], self.parameters.expand_norm),
            *((mean, variance), self._constant()),
        )
        self.affine = torch.stack((self.expand.scale, self.expand.shift)).float()

    def _constant(self) -> Tensor:
        """What z1 lacks: the expand convolution at the mean row, float32 [E]."""
        constant = self.wide_weight.float() @ self.pre.shift.float()
        bias = self.parameters.expand_bias
        return constant if bias is None else constant + bias

    def begin(self) -> Tensor | None:
        variance, mean = torch.var_mean(self.x.float(), 0, correction=0)
        self.statistics = (mean, variance)
        self._fold_pre()
        return None

    @property
    def measures(self) -> bool:
        return self._measures("expand_norm")

    def take_moments(self, moments: tuple[Tensor, Tensor] | None) -> None:
        if moments is None:
            moments = (torch.zeros_like(self.bias), torch.zeros_like(self.bias))
        self.statistics += tuple(moment.float() for moment in moments)
        self._fold_expand()

    def moments(self) -> dict[str, tuple[Tensor, ...]]:
        moments: dict[str, tuple[Tensor, ...]] = {}
        if self._measures("pre_norm"):
            moments["pre_norm"] = (self.statistics[0], self.statistics[1])
        if self._measures("expand_norm"):
            moments["expand_norm"] = (self.statistics[2] + self._constant(), self.statistics[3])
        return moments

    def backward(
        self,
        grad: Tensor,
        z1: Tensor | None,
        total: Tensor,
        product: Tensor,
        addend: Tensor | None,
        needed: frozenset[str],
    ) -> dict[str, Tensor]:
        count = self.x.shape[0]
        grad_scale, (a, b, c), grad_constant = self.expand.gradients(total, product, count)
        gradients = {
            "expand_norm_weight": grad_scale,
            "expand_norm_bias": total,
            "expand_bias": grad_constant,
        }
        factors = torch.stack((a, b, c)).float()
        grad_folded = expand_weight(grad, z1, factors, self.rows, self.centre)
        grad_weight = grad_folded * self.pre.scale.float()
        # Sums over all rows of pre_norm's output gradient, and of it times (x - mean).
        pre_total = torch.zeros_like(self.pre.shift)
        if not self.expand.measured:
            grad_weight.addr_(grad_constant.float(), self.pre.shift.float())
            pre_total = grad_constant @ self.wide_weight.double()
        pre_product = (self.wide_weight * grad_folded).sum(0).double()
        gradients["expand_weight"] = grad_weight
        grad_scale, (_, slope, constant), _ = self.pre.gradients(pre_total, pre_product, count)
        gradients["pre_norm_weight"] = grad_scale
        gradients["pre_norm_bias"] = pre_total
        if "x" in needed:
            affine = torch.stack((slope, constant - slope * self.centre.double())).float()
            gradients["x"] = expand_input(
                *(grad, z1, factors, self.weight, self.rows, None, affine, addend),
                self.x.dtype,
            )
        return gradients
