"""A decoder that reads a text as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import MakeBackbone, MakeModel
from rcc import InputError, RCCForCausalLM
from rcc.cli.evaluation_options import QAOptions, ReconstructionOptions
from rcc.evaluation.uncompressed import base_decoder, read_plain


def test_a_base_is_read_without_a_trace(fresh: MakeModel, backbone: MakeBackbone) -> None:
    """Within `base_decoder` the decoder is its base; after it all is as before: results, fingerprint, what learns."""
    model, base = fresh(), backbone("llama", seed=1)
    next(p for name, p in model.decoder.named_parameters() if ".lora_" in name).requires_grad_(False)
    ids = torch.arange(1, 30)[None]
    learning = [p.requires_grad for p in model.parameters()]
    own, fingerprint = model(ids).logits, model.fingerprint
    with torch.no_grad(), base_decoder(model):
        torch.testing.assert_close(model(ids).logits, base(ids).logits)
        context = read_plain(model, ids[0, :20])
        torch.testing.assert_close(model(ids[:, 20:], context=context).logits, base(ids).logits[:, 20:])
        assert (len(context), context.rate) == (20, 1)
    assert torch.equal(model(ids).logits, own)
    assert not torch.allclose(own, base(ids).logits, atol=1e-2)
    assert [p.requires_grad for p in model.parameters()] == learning
    assert model.fingerprint == fingerprint


def test_a_merged_decoder_is_refused(fresh: MakeModel, tmp_path: Path) -> None:
    """Merged LoRA cannot be taken out: no figure of a base may come from it. So `rcc eval` keeps it apart for them."""
    fresh().save_pretrained(tmp_path / "model", full=True)
    model = RCCForCausalLM.from_pretrained(tmp_path / "model", adapters="merged")
    with pytest.raises(InputError, match='adapters="separate"'), base_decoder(model):
        pass
    assert [kind.adapters for kind in (ReconstructionOptions, QAOptions)] == ["separate"] * 2
