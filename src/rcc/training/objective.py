"""What is minimised: cross-entropy on the targets and, if asked for, the distance to a teacher that read the text."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoints
from ..errors import ModelError
from ..model.losses import PLAIN, TrainingLoss
from ..model.rcc import RCCForCausalLM
from ..model.training_pass import TrainingBatch, likeliest, training_pass
from .stage import Distillation


class Objective(nn.Module):
    """A model and its loss, as one module: what DDP and FSDP wrap and Trainer calls.

    Args:
        dtype: of the computation; weights that learn stay in float32.
        distillation: see :class:`Distillation`; its teacher is made here.
        loss: what the targets' loss is computed with.
    """

    def __init__(
        self,
        model: RCCForCausalLM,
        dtype: torch.dtype,
        distillation: Distillation | None = None,
        loss: TrainingLoss = PLAIN,
    ):
        super().__init__()
        self.model, self.dtype, self.distillation, self.loss = model, dtype, distillation, loss
        # in a list: not a part of this module, which is put in training mode and handed out to processes
        self._teacher: list[nn.Module] = [] if distillation is None else [make_teacher(model)]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        logits_to_keep: Tensor,
        context_ids: Tensor | None = None,
        rate: int | None = None,
        kind: str = "",
        attention_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        teacher_ids: Tensor | None = None,
        teacher_mask: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> dict[str, Any]:
        """Compute the loss of a batch as :mod:`rcc.training.tasks` collates it.

        Returns:
            `loss`; the `logits` [B, U, V] that it came from, None where the loss has a head of its own; and outside
            training the likeliest `tokens` [B, U].
        """
        with torch.autocast(input_ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            batch = TrainingBatch(
                input_ids=input_ids,
                attention_mask=attention_mask,
                labels=labels,
                logits_to_keep=logits_to_keep,
                context_ids=context_ids,
                context_mask=context_mask,
                rate=rate,
                predicted=predicted,
            )
            out = training_pass(self.model, batch, self.loss)
            loss = out.loss
            if teacher_ids is not None and self.distillation is not None:
                with torch.no_grad():
                    # the teacher's rows end in the same columns: the same target follows its longer prompt
                    shift = teacher_ids.shape[1] - input_ids.shape[1]
                    order = (teacher_mask.cumsum(1) - 1).clamp(min=0) if teacher_mask is not None else None
                    wanted = self._teacher[0](
                        input_ids=teacher_ids,
                        attention_mask=teacher_mask,
                        position_ids=order,
                        use_cache=False,
                        logits_to_keep=shift + logits_to_keep,
                    ).logits
                real = nn.functional.pad(labels, (0, 1), value=-100)[:, logits_to_keep + 1] != -100
                assert loss is not None
                assert out.logits is not None  # a model with a teacher has no head for losses
                distance = divergence(out.logits[real], wanted[real], self.distillation)
                loss = (1 - self.distillation.weight) * loss + self.distillation.weight * distance
        tokens = None if self.training else likeliest(out, self.loss)
        return {"loss": loss, "logits": out.logits, "tokens": tokens}


def divergence(student: Tensor, teacher: Tensor, settings: Distillation) -> Tensor:
    """Return the mean KL(teacher ‖ student) over tokens, in nats: logits [N, V] → scalar.

    With `top_k` the teacher's k likeliest tokens are compared one by one and all others as one: a lower bound that
    needs no vocabulary-wide teacher.
    """
    ours = torch.log_softmax(student.float() / settings.temperature, -1)
    theirs = torch.log_softmax(teacher.float() / settings.temperature, -1)
    if not settings.top_k or settings.top_k >= ours.shape[-1]:
        return nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    theirs, index = theirs.topk(settings.top_k, -1)
    ours = ours.gather(-1, index)
    ours, theirs = (torch.cat([x, _rest(x)], -1) for x in (ours, theirs))
    return nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def _rest(logs: Tensor) -> Tensor:
    """Return the log of what is left of the probability, [N, k] → [N, 1]."""
    return torch.log1p(-logs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))


def make_teacher(model: RCCForCausalLM) -> nn.Module:
    """Return the decoder as it was before training, frozen: its base without LoRA, sharing weights that are frozen.

    Raises:
        ModelError: the decoder's own weights are trained, and there is no base to load the teacher from.
    """
    decoder = model.decoder
    if model.config.is_frozen("decoder"):
        teacher: nn.Module = copy.deepcopy(decoder, memo={id(p): p for p in decoder.parameters()})
        for name, module in list(teacher.named_modules()):
            if hasattr(module, "base_layer"):
                parent, _, leaf = name.rpartition(".")
                setattr(teacher.get_submodule(parent), leaf, module.base_layer)
    else:
        if "decoder" not in model.config.base:
            raise ModelError("distillation needs the decoder's base in a folder: name it in model.decoder.")
        path = checkpoints.resolve_base(model.config.base["decoder"].source)
        teacher = checkpoints.load_backbone(path, head=True, dtype="auto")
        teacher.to(model.device)  # type: ignore[arg-type]  # transformers' wrapper hides its types
        teacher.requires_grad_(False)
    teacher.eval()
    return teacher
