"""A plan is the model's, and the command prints it as the documentation shows."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import Command, make_backbone, tokens
from rcc import ModelError, RCCConfig, RCCForCausalLM, SideConfig, WindowError, checkpoints
from rcc.model import backbones
from rcc.model.freezing import freeze
from rcc.planning import plan as planning
from rcc.planning import shapes
from rcc.planning.activations import Activations
from rcc.training.recipe import Recipe
from rcc.training.settings import build

PAGE = (Path(__file__).resolve().parents[2] / "docs/backbones.md").read_text(encoding="utf-8")
PLANS = re.findall(r"^```sh\nrcc (plan [^\n]+)\n```\n\n```text\n(.*?)^```$", PAGE, re.M | re.S)
HOW_TO = PAGE[PAGE.index("## Bring your own backbone") : PAGE.index("### What is refused")]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def call(command: Command) -> Callable[..., str]:
    """`rcc …` inside this process → what it printed; `refused` is the one sentence of an exit with code 2."""

    def run(*arguments: Any, refused: bool = False) -> str:
        code, out, err = command(*arguments)
        if not refused:
            assert (code, err) == (0, "")
            return out
        assert (code, out) == (2, "")
        assert re.fullmatch(r"rcc: [^\n]+\.\n", err)
        return err

    return run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are tested elsewhere."""
    monkeypatch.setattr(planning, "activations", lambda *_: Activations(2 * 10**9, 10**9))


def folder_of(body: Any, folder: Path) -> Path:
    """A folder with a config.json and nothing else."""
    body.config.save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return folder


SIDES: dict[str, dict[str, Any]] = {
    "shared": {},
    "full": {"full": True},
    "two": {"encoder": ("llama", 5, 32)},
    "two, LoRA": {"encoder": ("qwen2", 2, 32), "lora_rank": 4},
    "mamba": {"encoder": ("mamba", 4, 32)},
    "mamba, LoRA": {"encoder": ("mamba", 4, 32), "lora_rank": 4},
}


@pytest.mark.parametrize("settings", SIDES.values(), ids=SIDES)
@pytest.mark.usefixtures("quick")
def test_plan_is_the_models(settings: dict[str, Any], tmp_path: Path) -> None:
    """Parameters, bytes of weights and the longest text are those of the model that is made of the weights."""
    settings = dict(settings)
    decoder = make_backbone("gpt_neox")
    encoder = make_backbone(*settings.pop("encoder")) if "encoder" in settings else None
    sides = folder_of(decoder, tmp_path / "lower"), None if encoder is None else folder_of(encoder, tmp_path / "upper")
    data = planning.plan(*sides, rates=[4, 8], segment_length=16, dtype=torch.float32, **settings)

    rank = settings.get("lora_rank", 0 if settings.get("full") or encoder is not None else 16)
    config = RCCConfig(segment_length=16, rates=[4, 8], encoder=SideConfig(rank), decoder=SideConfig(rank))
    shared = encoder is None and not settings.get("full")
    model = RCCForCausalLM.from_base(encoder or decoder, None if shared else decoder, config)
    assert data["parameters"] == sum(p.numel() for p in model.parameters())
    assert data["parameters"] == data["backbone"]["parameters"] + sum(data["added"].values())
    assert data["backbone"]["parameters"] == sum(p.numel() for p in decoder.parameters())
    plain, four, eight = data["reading"]
    assert four["weights_bytes"] == sum(p.nbytes for p in model.parameters())
    assert plain["weights_bytes"] == sum(p.nbytes for p in decoder.parameters())
    assert (plain["longest_text"], four["longest_text"]) == (256, 4 * 256)  # half of 512: less than the reserve is left
    assert model.fitting_rate([four["longest_text"]]) == 4
    assert model.fitting_rate([four["longest_text"] + 1]) == 8
    assert model.fitting_rate([eight["longest_text"]]) == 8
    with pytest.raises(WindowError):
        model.fitting_rate([eight["longest_text"] + 1])

    context = model.compress(torch.tensor([tokens(64)]), rate=8)
    assert data["position_bytes"] == context.nbytes // 8
    row = eight["texts"][0]
    assert (row["tokens"], row["positions"], row["fits"]) == (32_768, 4096, False)
    assert row["bytes"] == eight["weights_bytes"] + 4096 * data["position_bytes"]
    way = [row for row in data["training"] if row["learns"] == data["learns"]]
    learned = [sum(p.numel() for p in model.parameters() if p.requires_grad)]
    freeze(model, ["encoder"], torch.float32)
    learned.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert [row["parameters"] for row in way] == learned


@pytest.mark.usefixtures("quick")
def test_json(call: Callable[..., str], tmp_path: Path) -> None:
    """The text shows the data's numbers."""
    folder = folder_of(make_backbone("llama"), tmp_path / "base")
    arguments = ["plan", folder, "--segment-length", 16, "--rates", "4, 8", "--lora-rank", 2]
    data = json.loads(call(*arguments, "--json"))
    assert data == json.loads(call("plan", folder / "config.json", *arguments[2:], "--json")) | {
        "backbone": data["backbone"]
    }
    text = call(*arguments)
    assert str(folder) in text
    for number in (data["parameters"], *data["added"].values(), data["position_bytes"]):
        assert f"{number:,}" in text
    for row in data["reading"]:
        assert f"{row['longest_text']:,}" in text
    assert text.count("about") == 2 * len(data["training"])
    assert "LoRA of rank 2, encoder frozen" in text
    other = json.loads(call(*arguments[:-2], "--full", "--dtype", "float32", "--json"))
    assert other["added"]["encoder"] > 0
    assert other["position_bytes"] == 2 * data["position_bytes"]
    direct = json.loads(call(*arguments, "--prefix", "direct", "--json"))
    assert direct["added"]["sink"] == 3 * 48
    assert "sink" not in data["added"]


def test_family_that_is_not_supported(call: Callable[..., str], tmp_path: Path) -> None:
    """Refused with the sentence that loading gives."""
    folder = tmp_path / "base"
    for family, shape in (("gpt2", {"n_embd": 8, "n_head": 2}), ("mamba", {"hidden_size": 8})):
        config = AutoConfig.for_model(family, **shape, num_hidden_layers=1, vocab_size=9)
        body = AutoModelForCausalLM.from_config(config)
        body.save_pretrained(folder)
        with pytest.raises(ModelError) as loading:
            RCCForCausalLM.from_base(folder)
        assert call("plan", folder, refused=True) == f"rcc: {loading.value}\n"
    (folder / "config.json").write_text('{"model_type": "of tomorrow"}')
    said = call("plan", folder, refused=True)
    assert said.startswith("rcc: backbone family 'of tomorrow' is not supported: use one of ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not JSON: name a model's config.json"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "has no model_type"),
        ('{"hidden_size": 8}', "has no model_type"),
        ('{"model_type": 3}', "has no model_type"),
        ('{"model_type": "rcc"}', "has format version None"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "does not describe a llama model"),
        ('{"model_type": "llama", "hidden_act": "none"}', "no model can be made of this shape"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "no model can be made of this shape"),
    ],
)
def test_bad_configuration(content: str, words: str, call: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    for path in (tmp_path, tmp_path / "config.json"):
        assert words in call("plan", path, refused=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nothing", "'nothing' is neither a known shape (gemma-3-1b,"),
        ("some/model", "nor could it be fetched from the hub: HF_HUB_OFFLINE is set"),
        ("./nothing", "a config.json file nor a folder"),
        ("rcc-smollm2-135m", "`rcc models` lists what comes with rcc, and its base is smollm2-135m-instruct"),
        ("tests", "has no config.json"),
        ("pythia-1.4b --rates 8,7", "rate=7 does not divide the segment of 2048 tokens: use one of 1, 2, 4"),
        ("pythia-1.4b --rates 8;7", "--rates '8;7' is no whole number"),
        ("pythia-1.4b --segment-length 4096", "more than the 2048 positions that the encoder can address"),
        ("pythia-1.4b --full --lora-rank 4", "leave out --lora-rank"),
        ("pythia-1.4b --dtype int8", "dtype int8 is unknown"),
        ("pythia-1.4b --encoder nothing", "'nothing' is neither"),
        ("pythia-1.4b --prefix sideways", "prefix='sideways' is unknown"),
        ("pythia-1.4b --prefix direct", "with the sink before it is more than the 2048 positions"),
    ],
)
def test_refused(arguments: str, words: str, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    assert words in call("plan", *arguments.split(), refused=True)


@pytest.mark.parametrize(("line", "shown"), PLANS, ids=[command.split()[-1] for command, _ in PLANS])
def test_plans_of_the_docs(line: str, shown: str, call: Callable[..., str], request: pytest.FixtureRequest) -> None:
    """What the page shows is what is printed. Of one model also the estimates, to a tenth: torch's versions differ."""
    whole = "pythia" in line
    if not whole:
        request.getfixturevalue("quick")
    about = re.compile(r" *about ([0-9.]+) GB")
    told = call(*shlex.split(line))
    assert about.sub(" about", told).split() == about.sub(" about", shown).split()
    for given, said in zip(about.findall(told), about.findall(shown), strict=True):
        assert not whole or float(given) == pytest.approx(float(said), rel=0.1, abs=0.1)


def test_docs_show_four_plans() -> None:
    assert [command.split()[-1] for command, _ in PLANS] == ["pythia-1.4b", "llama-3.1-8b", "qwen3-4b", "mistral-7b"]
    for name in shapes.SHAPES:
        assert f"`{name}`" in PAGE
    table = re.findall(r"^\| `(\w+)` \|.*?\| (yes|no) \| (yes|no) \|", PAGE, re.M)
    for family, decoder, encoder in table:
        if family in backbones.BLOCKS:
            assert (decoder, encoder) == ("no" if family in backbones.STATE_SPACE else "yes", "yes")
    assert set(backbones.BLOCKS) <= {family for family, *_ in table}


@pytest.mark.usefixtures("quick")
def test_how_to(call: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs, the recipe and the commands of "Bring your own backbone", on tiny backbones."""
    monkeypatch.chdir(tmp_path)
    for name, backbone in (
        ("my-backbone", make_backbone("llama", window=2048)),
        ("my-reader", make_backbone("llama", 5, 32, window=2048)),
        ("my-mamba", make_backbone("mamba", 4, 32)),
    ):
        backbone.save_pretrained(name)
    scope: dict[str, Any] = {}
    for program in re.findall(r"^```python\n(.*?)^```$", HOW_TO, re.M | re.S):
        exec(program, scope)
        scope["model"].compress(torch.tensor([tokens(300)]))
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```$", HOW_TO, re.M | re.S)
    assert build(Recipe, yaml.safe_load(recipe), "").model.decoder == "my-backbone"
    Path("own.yaml").write_text(recipe)
    Path("my-texts.jsonl").write_text(json.dumps({"text": "A long story. " * 500}) + "\n")
    monkeypatch.setattr(checkpoints, "home", lambda: tmp_path)  # no tokenizer is at hand there
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", HOW_TO, re.M | re.S)
    for command in commands.splitlines():
        assert "memory" in call(*shlex.split(command)[1:])
