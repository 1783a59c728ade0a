"""What is said, once, of a model whose backward pass saves less than it might."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..log import and_others, logger


class Notices:
    """What the hooks of one optimizer have to say of their model; each of it once.

    Args:
        layerwise: whether weights are updated during the backward pass.
        projected_backward: whether linear targets compute R without building their gradient.
    """

    def __init__(self, *, layerwise: bool, projected_backward: bool) -> None:
        self._layerwise = layerwise
        self._projected_backward = projected_backward
        self._said: set[str] = set()

    def _is_new(self, notice: str) -> bool:
        new = notice not in self._said
        self._said.add(notice)
        return new

    def not_served(self, reasons: Mapping[str, str], projecting: int) -> None:
        """Say which modules build their gradient in spite of a projected backward; a warning where it is most of them.

        Args:
            reasons: why, by the modules' names.
            projecting: how many modules have targets, those included.
        """
        if not reasons or not self._is_new("not served"):
            return
        name, reason = next(iter(reasons.items()))
        others = and_others(len(reasons) - 1, link=", nor ")
        message = f"The projected backward cannot serve {name} ({reason}){others}: gradients are built there."
        served = projecting - len(reasons)
        if 2 * served >= projecting:
            logger.info("%s", message)
            return
        logger.warning(
            "%s It serves %s of the %d modules with targets, so a step takes more memory and time than it would with "
            "plain linear layers. If that is meant, say so by projected_backward=false.",
            message,
            served or "none",
            projecting,
        )

    def not_recognised(self, name: str) -> None:
        """Warn that the gradient of a stack of weights is built.

        Args:
            name: of the module that has it.
        """
        if self._is_new("not recognised"):
            logger.warning(
                "The projected backward cannot serve %s: it uses a stack of weights in no product that is recognised "
                "(grouped_mm, bmm, or F.linear and matmul with weight[i]), so that its gradient is built, which takes "
                "more memory. A model of transformers can be switched: model.set_experts_implementation('grouped_mm'). "
                "If it is meant, say so by projected_backward=false. This is said once.",
                name,
            )

    def own_reduction(self, what: str) -> None:
        """Warn that gradients are built, as a program has them reduced in its own way.

        Args:
            what: it does, in words.
        """
        if self._is_new("own reduction"):
            logger.warning(
                "The gradients of the weights are built, and no low-rank ones reduced in their place: %s. A step takes "
                "more memory. If that is meant, say so by projected_backward=false.",
                what,
            )

    def half_done(self, name: str) -> None:
        """Warn that the hooks go between a backward pass and its step.

        Args:
            name: of a weight that has been updated.
        """
        logger.warning(
            "Training stopped in the middle of a step: it has updated some weights already (%s for one), others "
            "perhaps not. Checkpoints are of whole steps.",
            name,
        )

    def compiled(self) -> None:
        """Warn that compiling the model gains little, and what it may cost."""
        if not self._is_new("compiled"):
            return
        what = "layerwise updates" if self._layerwise else "a projected backward"
        cost = "so little is left to compile"
        if self._layerwise and not self._projected_backward:
            cost += (
                "; and a compiled part hands over all its gradients at once, so that as much memory may be taken as "
                "without layerwise"
            )
        logger.warning(
            "The model is compiled, and has %s: their hooks break the compiled graph at each layer, %s. The weights "
            "come out the same. Leave out torch_compile, or use a plain galore_* optimizer without projected_backward.",
            what,
            cost,
        )


def is_compiled(model: nn.Module) -> bool:
    """Whether a model, or a module of it, is compiled: by `torch.compile(model)` or `model.compile()`."""
    # The first is a module that holds the other as `_orig_mod`; asking for its class would import the compiler.
    return any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules())
