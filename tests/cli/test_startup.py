"""What a verb imports, and when: seconds that a user waits for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import learning
from command_line import LIMIT, environment
from rcc import RCCConfig, RCCForCausalLM

WORDS = [f"{a}{b}" for a in "abcdefgh" for b in "klmnopqr"][:60]
UNUSED = (
    "peft",  # LoRA is merged
    "gguf",  # the base is an ordinary folder
    "sklearn",
    "datasets",
    "torchvision",
    "tensorflow",
    "lm_eval",
    "matplotlib",
    "transformers.trainer",
    "rcc.training",
    "rcc.data",
    "rcc.planning",
    "rcc.integrations",
    "rcc.evaluation.evaluation",
    "rcc.evaluation.qa",
    "rcc.evaluation.reconstruction",
)
"""What no question needs."""
WATCHED = """
import gc, json, sys
from rcc import checkpoints
from rcc.cli.app import main

hash_ahead, torch_by_then = checkpoints.hash_ahead, []

def noted(*arguments):
    torch_by_then.append("torch" in sys.modules)
    hash_ahead(*arguments)

checkpoints.hash_ahead = noted
try:
    main()
finally:
    collector = gc.isenabled(), gc.get_freeze_count() > 100_000
    print(json.dumps({"modules": list(sys.modules), "hashed": torch_by_then, "gc": collector}), file=sys.stderr)
"""


def test_a_question_imports_what_it_needs(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """LoRA merged, of a stored context; weights are being hashed before torch is imported."""
    base = learning.make_base(tmp_path / "base", WORDS, learning.SPLIT, window=512)
    config = RCCConfig(segment_length=16, rates=[4], name="words")
    model = RCCForCausalLM.from_base(base, config=config)
    assert any(".lora_" in name for name in model.own_state_dict())
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(WORDS))
    context = tmp_path / "text.rcc"
    code, _, said = command("compress", tmp_path / "text.txt", "-o", context, "--model", tmp_path / "model")
    assert code == 0, said
    asked = [sys.executable, "-c", WATCHED, "ask", str(context), "ak", "--model", str(tmp_path / "model"), "--json"]
    done = subprocess.run(
        [*asked, "--max-new-tokens", "2"], capture_output=True, text=True, env=environment(), timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["answers"]) == 1
    seen = json.loads(done.stderr.splitlines()[-1])
    families = [name for name in seen["modules"] if re.fullmatch(r"transformers\.models\.(\w+)\.modeling_\1", name)]
    assert [name for name in families if ".auto." not in name] == ["transformers.models.gpt_neox.modeling_gpt_neox"]
    assert [name for name in seen["modules"] if f"{name}.".startswith(tuple(f"{u}." for u in UNUSED))] == []
    assert seen["hashed"] == [False]
    assert seen["gc"] == [True, True]
