"""How persistent sources climb their gradient (spec L6): sign, sgd, adam."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.adam import adam

from pdlightning.schedules import Scheduled, Value


class Ascent(nn.Module):
    """One move of tensors along their gradient, in place.

    `moments` are the names of what the ascent keeps of a tensor, each of its shape. They come in `state`, and so does
    "count", the number of its ascents with this one: 0-d, or one number for each entry of the first axis.

    Args:
        lr: size of a move, a number or a schedule of its own (spec S1).
    """

    moments: tuple[str, ...] = ()

    def __init__(self, *, lr: Value):
        super().__init__()
        if not callable(lr) and not lr >= 0:
            raise ValueError(f"{type(self).__name__}(lr): expected a number >= 0 or a schedule, got {lr}.")
        self.lr = Scheduled(lr)

    def forward(self, values: list[Tensor], gradients: list[Tensor], state: dict[str, list[Tensor]]) -> None:
        raise NotImplementedError(f"{type(self).__name__} must move the values in place.")


class SignAscent(Ascent):
    """r += lr * sign(g)."""

    def forward(self, values: list[Tensor], gradients: list[Tensor], state: dict[str, list[Tensor]]) -> None:
        for value, gradient in zip(values, gradients, strict=True):
            value.add_(gradient.sign().mul_(self.lr.number))


class SGDAscent(Ascent):
    """r += lr * g."""

    def forward(self, values: list[Tensor], gradients: list[Tensor], state: dict[str, list[Tensor]]) -> None:
        for value, gradient in zip(values, gradients, strict=True):
            value.add_(gradient * self.lr.number)


class AdamAscent(Ascent):
    """m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  r += lr * (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps).

    k is the number of ascents, this one included (spec L6).
    """

    moments = ("first", "second")

    def __init__(self, *, lr: Value, betas: tuple[float, float], eps: float = 1e-8):
        super().__init__(lr=lr)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas) or eps <= 0:
            raise ValueError(f"AdamAscent: betas are two numbers in [0, 1) and eps > 0, got {betas} and {eps}.")
        self.betas, self.eps = tuple(betas), eps

    def forward(self, values: list[Tensor], gradients: list[Tensor], state: dict[str, list[Tensor]]) -> None:
        b1, b2 = self.betas
        first, second, counts = state["first"], state["second"], state["count"]
        if counts[0].ndim == 0:
            adam(
                values, [g.contiguous() for g in gradients], first, second, [], [count - 1 for count in counts],
                fused=True, amsgrad=False, beta1=b1, beta2=b2, lr=self.lr.number, weight_decay=0.0, eps=self.eps,
                maximize=True,
            )  # fmt: skip
            return
        for r, g, m, v, count in zip(values, gradients, first, second, counts, strict=True):
            k = count.to(r.dtype).reshape(-1, *(1,) * (r.ndim - 1))
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            root = (v / (1 - b2**k)).sqrt_().add_(self.eps)
            r.addcdiv_(m * (self.lr.number / (1 - b1**k)), root)
