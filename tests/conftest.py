"""Tiny random models whose every part matters, so that a part that is missing or misplaced is seen."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import reference as ref
from command_line import Result
from rcc import RCCConfig, RCCForCausalLM, SideConfig, checkpoints
from rcc.cli import app as cli
from rcc.runtime import allocator

pytest_plugins = ["training_runs", "appended_context", "short_text"]
"""Fixtures of whole training runs, of a context and of a short text: one for all files that look at them."""
VOCABULARY = 97
FAMILIES = ["llama", "gpt_neox"]
"""What the tests run on."""
GROUPED = {"num_key_value_heads": 2, "rope_theta": 1000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**GROUPED, "tie_word_embeddings": True},
    "gpt_neox": {"tie_word_embeddings": False, "rotary_pct": 0.5},
    "mistral": {**GROUPED, "tie_word_embeddings": False, "sliding_window": None},
    "qwen2": {**GROUPED, "tie_word_embeddings": True},
    "qwen3": {**GROUPED, "tie_word_embeddings": True, "head_dim": 16},
    "gemma3_text": {  # layers by turns slide and see all
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 20,
        "sliding_window": 7,
        "sliding_window_pattern": 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
        "tie_word_embeddings": True,
    },
    "mamba": {"state_size": 4, "tie_word_embeddings": True},
    "mamba2": {"state_size": 4, "num_heads": 8, "n_groups": 2, "chunk_size": 8, "tie_word_embeddings": False},
}
STATE_SPACE = ["mamba", "mamba2"]
"""Encoders only."""
DECODERS = [family for family in SHAPES if family not in STATE_SPACE]
SIDES: dict[str, dict[str, Any]] = {}
"""What the tests that show a family to work run on: every decoder with an encoder on its own weights, with one of
its own family, and with Mamba's, of another depth and width. Arguments of `make_model` by name."""
for decoder in DECODERS:
    SIDES[f"{decoder}-shared"] = {"family": decoder}
    SIDES[f"{decoder}-{decoder}"] = {"family": decoder, "share": False}
    for encoder in STATE_SPACE:
        other = {"encoder": encoder, "share": False, "layers": (4, 3), "hidden": (32, 48)}
        SIDES[f"{decoder}-{encoder}"] = {"family": decoder, **other}


def load_script(path: str) -> ModuleType:
    """Import a script by its path in the repository."""
    file = Path(__file__).resolve().parents[1] / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WORKER = "PYTEST_XDIST_WORKER" in os.environ
THREADS = 1 if WORKER else 2
"""Of several test processes each has a core, for itself and for the processes that it starts."""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Whatever a test did with torch's threads does not slow down the next one."""
    torch.set_num_threads(THREADS)
    os.environ["RCC_MODEL"] = "rcc-smollm2-135m"  # the default is four times as large; test_default_model.py has it
    yield
    torch.set_num_threads(THREADS)
    os.environ["RCC_MODEL"] = "rcc-smollm2-135m"  # the default is four times as large; test_default_model.py has it


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The command line's own handlers, where a test ran it in this process, do not outlive the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


Command = Callable[..., tuple[int, str, str]]
"""The fixture `command`."""
Call = Callable[..., Result]
"""The fixture `call`."""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`rcc …` inside this process → exit code, standard output, standard error."""
    monkeypatch.setattr(allocator, "configure", lambda: True)  # it would change this process's memory for good

    def run(*args: Any, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rcc", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def call(command: Command) -> Call:
    """`rcc …` inside this process."""
    return lambda *args, stdin=b"": Result(*command(*args, stdin=stdin))


LONGEST = ("test_readme.py", "test_write_questions.py", "test_terminal.py", "test_lm_eval.py", "test_small_model.py")
"""Files that take minutes: begun first, so that no process ends long after the others (scripts/test.sh)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, the others in their order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)
    os.environ["RCC_MODEL"] = "rcc-smollm2-135m"  # the default is four times as large; test_default_model.py has it
    if WORKER:
        os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


MakeBackbone = Callable[..., PreTrainedModel]
"""The fixture `backbone`: :func:`make_backbone`."""


def make_backbone(
    family: str, layers: int = 3, hidden: int = 48, seed: int = 0, attn: str = "sdpa", window: int = 512, **more: Any
) -> PreTrainedModel:
    """A causal language model of a supported family, without an end token; `more` goes into its configuration."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        **SHAPES[family],
    }
    if family == "mamba2":
        shape["head_dim"] = 2 * hidden // shape["num_heads"]
    if family not in STATE_SPACE:
        shape |= {"num_attention_heads": 4, "max_position_embeddings": window, "attn_implementation": attn}
    shape |= more
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
                elif "embed" in name or "lm_head" in name:
                    parameter.normal_(0, 0.5)
                else:
                    # what a state-space model's x_proj and mamba2's in_proj give is multiplied with itself
                    product = "x_proj" in name or (family == "mamba2" and "in_proj" in name)
                    parameter.normal_(0, (0.4 if product else 1.2) / parameter.shape[1] ** 0.5)
    return model.eval()


@torch.no_grad()
def randomise(model: RCCForCausalLM, seed: int = 0) -> RCCForCausalLM:
    """Random projections, LoRA and memory: as made, most projections and all of LoRA's B are zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.startswith("projections."):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7 / parameter.shape[1] ** 0.5)
        elif ".lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6 / parameter.shape[1] ** 0.5)
        elif name in ("memory", "sink"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


MakeModel = Callable[..., RCCForCausalLM]
"""The fixtures `tiny` and `fresh`: :func:`make_model`."""


def make_model(
    family: str = "llama",
    *,
    encoder: str | None = None,
    share: bool = True,
    layers: tuple[int, int] = (3, 3),
    hidden: tuple[int, int] = (48, 48),
    lora: int | None = None,
    attn: str = "sdpa",
    window: int = 512,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    segment_length: int = 16,
    rates: tuple[int, ...] = (4, 1, 2, 8, 16),
    **config: Any,
) -> RCCForCausalLM:
    """An RCC model; `layers` and `hidden` are the encoder's and the decoder's, `lora` the rank on both sides."""
    lora = (4 if share else 0) if lora is None else lora
    settings = RCCConfig(
        segment_length=segment_length,
        rates=list(rates),
        share_base=share,
        encoder=SideConfig(lora),
        decoder=SideConfig(lora),
        **config,
    )
    decoder_base = make_backbone(family, layers[1], hidden[1], seed + 1, attn, window)
    if share:
        model = RCCForCausalLM.from_base(decoder_base, config=settings)
    else:
        encoder_base = make_backbone(encoder or family, layers[0], hidden[0], seed + 2, attn, window)
        model = RCCForCausalLM.from_base(encoder_base, decoder_base, config=settings)
    randomise(model, seed)
    for parameter in model.parameters():  # not the rotary frequencies: they stay float32, as from_pretrained has them
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture(scope="session")
def tiny() -> MakeModel:
    """`make_model`, one model for the same arguments: not to be changed."""
    return functools.cache(make_model)


@pytest.fixture(scope="session")
def fresh() -> MakeModel:
    """`make_model`: a model to be changed."""
    return make_model


@pytest.fixture(scope="session")
def backbone() -> MakeBackbone:
    return make_backbone


class MakeTokens(Protocol):
    """The fixture `tokens`: :func:`tokens`."""

    def __call__(self, length: int, seed: int = 0) -> list[int]: ...


def tokens(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()


@pytest.fixture(scope="session", name="tokens")
def tokens_fixture() -> MakeTokens:
    return tokens


class Expected:
    """The reference computation with a model's weights and settings."""

    def __init__(self, model: RCCForCausalLM) -> None:
        config = model.config
        projections: list[torch.Tensor] = [p.get_parameter("weight") for p in model.projections]
        self.weights = model.encoder, model.decoder, projections
        self.rate = config.rates[0]
        self.settings = {
            "segment": config.segment_length,
            "layer_map": config.layer_map,
            "states": config.states,
            "padding": config.segment_padding,
            "memory": model.memory,
        }
        if model.rate_embeddings is not None:  # of trained rates; tests of others set them
            self.settings["offsets"] = dict(zip(config.rates, model.rate_embeddings, strict=True))

    def _settings(self, rate: int | list[int] | None) -> dict[str, Any]:
        return {**self.settings, "rate": rate or self.rate}

    def logits(self, texts: list[list[int]], prompt: list[int], rate: int | list[int] | None = None) -> torch.Tensor:
        return ref.reference(*self.weights, texts, prompt, **self._settings(rate))[0]

    def vectors(self, texts: list[list[int]], rate: int | list[int] | None = None) -> torch.Tensor:
        return ref.reference(*self.weights, texts, [1], **self._settings(rate))[1]

    def greedy(
        self, texts: list[list[int]], prompt: list[int], new: int, rate: int | list[int] | None = None
    ) -> list[int]:
        return ref.greedy(new, *self.weights, texts, prompt, **self._settings(rate))

    def beams(self, texts: list[list[int]], prompt: list[int], new: int, beams: int) -> list[list[int]]:
        return ref.beam_search(new, beams, *self.weights, texts, prompt, **self._settings(None))


MakeExpected = Callable[[RCCForCausalLM], Expected]
"""The fixture `expected`."""


@pytest.fixture(scope="session")
def expected() -> MakeExpected:
    return Expected


class MakeBatch(Protocol):
    """The fixture `batch`: :func:`batch`."""

    def __call__(self, rows: list[list[int]], side: str = "right") -> tuple[torch.Tensor, torch.Tensor | None]: ...


def batch(rows: list[list[int]], side: str = "right") -> tuple[torch.Tensor, torch.Tensor | None]:
    """Texts of any lengths → ids [B, T] and mask (None where none is needed), padded on one side."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[b, columns], mask[b, columns] = torch.tensor(row), 1
    return ids, None if bool(mask.all()) else mask


@pytest.fixture(scope="session", name="batch")
def batch_fixture() -> MakeBatch:
    return batch


@pytest.fixture(scope="session")
def passkey_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[int]]:
    """The folder of a tiny model trained to find pass keys, and the keys that it was trained on; not to be changed."""
    from learning import train_passkey

    return train_passkey(tmp_path_factory.mktemp("passkey"))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in which nothing may have appeared at the end of the test."""
    path = tmp_path / "out"
    path.mkdir()
    yield path
    assert list(path.iterdir()) == []


@pytest.fixture(scope="session")
def default_base() -> Path:
    """The default model's base in the usual home: made there the first time, at once afterwards."""
    return checkpoints.ensure_base("smollm2-135m-instruct")
