"""Plans are those of the models that are made afterwards: parameters, bytes, lengths; and docs/backbones.md is true."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import conftest
from conftest import make_backbone, make_model, tokens
from rcc import ModelError, RCCConfig, RCCForCausalLM, WindowError, checkpoints
from rcc.model import backbones
from rcc.model.freezing import freeze
from rcc.planning import blueprint as planning
from rcc.planning import shapes
from rcc.planning.blueprint import Batch, Blueprint
from rcc.runtime import memory
from rcc.training.objective import Objective
from rcc.training.recipe import Recipe
from rcc.training.settings import build

PAGE = (Path(__file__).resolve().parents[2] / "docs/backbones.md").read_text(encoding="utf-8")
PLANS = re.findall(r"^```sh\nrcc (models --plan [^\n]+)\n```\n\n```text\n(.*?)^```$", PAGE, re.M | re.S)
DECODERS = set(backbones.BLOCKS) - set(backbones.STATE_SPACE)
HOW_TO = PAGE[PAGE.index("## Bring your own backbone") : PAGE.index("### What is refused")]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def call(command: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
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
    monkeypatch.setattr(planning, "activations", lambda *_: planning.Activations(2 * 10**9, 10**9))


def folder_of(body: Any, folder: Path) -> Path:
    """A folder with a config.json and nothing else."""
    body.config.save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return folder


# ---------------------------------------------------------------- known shapes
@pytest.mark.parametrize("name", shapes.SHAPES)
def test_published_counts(name: str) -> None:
    """The model of a known shape has as many parameters as the public one, under each of its names."""
    shape = shapes.SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.find(name))
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    for other in shape.ids:
        assert shapes.find(other).to_dict() == shapes.find(other.upper()).to_dict() == model.config.to_dict()


def test_published_figures() -> None:
    """Figures that others have published of these models."""
    counts = {
        "pythia-1.4b": 1_414_647_808,
        "llama-3.1-8b": 8_030_261_248,
        "qwen2.5-coder-0.5b": 494_032_768,
        "qwen3-4b": 4_022_468_096,
        "mistral-7b": 7_248_023_552,
        "gemma-3-1b": 999_885_952,
        "smollm2-135m": 134_515_008,
    }
    assert counts.items() <= {name: shape.parameters for name, shape in shapes.SHAPES.items()}.items()
    with torch.device("meta"):
        config = AutoConfig.for_model(**shapes.SHAPES["mistral-7b"].config | {"vocab_size": 32000})  # version 0.1
        first = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in first.parameters()) == 7_241_732_096
    for name, size in (("pythia-1.4b", 196_608), ("llama-3.1-8b", 131_072)):
        assert planning.position_bytes(Blueprint(RCCConfig(share_base=True), shapes.find(name)).build()) == size


@pytest.mark.parametrize("name", [n for n, s in shapes.SHAPES.items() if s.config["model_type"] in DECODERS])
def test_bytes_of_a_position(name: str) -> None:
    """Keys and values of every head of every layer, sliding or not, two bytes each."""
    shape = shapes.find(name)
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    config = RCCConfig(share_base=True, states="last")
    assert planning.position_bytes(Blueprint(config, shape).build()) == 2 * shape.num_hidden_layers * heads * width * 2


def test_names_are_one_models() -> None:
    names = Counter(name.lower() for known, shape in shapes.SHAPES.items() for name in (known, *shape.ids))
    assert max(names.values()) == 1
    assert "smollm2-135m-instruct" in names
    assert set(checkpoints.BASES) <= set(names)


def test_where_a_shape_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file or folder, under the model's folder first; then what a recipe says; then what is known."""
    monkeypatch.chdir(tmp_path)
    for name, layers in (("pythia-1.4b", 2), ("model/base", 3), ("base", 4)):
        folder_of(make_backbone("llama", layers), tmp_path / name)
    described = {"qwen3-4b": {"model_type": "llama", "num_hidden_layers": 5}}

    def layers_of(name: str | Path, **more: Any) -> int:
        return shapes.find(name, described, **more).num_hidden_layers

    assert layers_of("pythia-1.4b") == layers_of(Path("pythia-1.4b/config.json")) == 2
    assert layers_of("base") == 4
    assert layers_of("base", relative_to=tmp_path / "model") == 3
    assert layers_of("qwen3-4b") == 5
    assert layers_of("EleutherAI/pythia-1.4b") == 24


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hub id the config.json is fetched, and nothing else."""
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder_of(make_backbone("llama"), tmp_path / "hub"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert shapes.find("some/model").num_hidden_layers == 3
    assert asked == [("some/model", ["config.json"])]


# ---------------------------------------------------------------- a plan is the model's
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
    lower = make_backbone("gpt_neox")
    upper = make_backbone(*settings.pop("encoder")) if "encoder" in settings else None
    sides = [folder_of(lower, tmp_path / "lower"), upper and folder_of(upper, tmp_path / "upper")]
    data = planning.plan(*sides, rates=[4, 8], segment_length=16, dtype=torch.float32, **settings)

    rank = settings.get("lora_rank", 0 if settings.get("full") or upper is not None else 16)
    config = RCCConfig(segment_length=16, rates=[4, 8], encoder_lora_rank=rank, decoder_lora_rank=rank)
    named = [lower] if upper is None and not settings.get("full") else [upper or lower, lower]
    model = RCCForCausalLM.from_base(*named, config=config)
    assert data["parameters"] == sum(p.numel() for p in model.parameters())
    assert data["parameters"] == data["backbone"]["parameters"] + sum(data["added"].values())
    assert data["backbone"]["parameters"] == sum(p.numel() for p in lower.parameters())
    plain, four, eight = data["reading"]
    assert four["weights_bytes"] == sum(p.nbytes for p in model.parameters())
    assert plain["weights_bytes"] == sum(p.nbytes for p in lower.parameters())
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


@pytest.mark.parametrize("family", conftest.DECODERS)
def test_bytes_of_every_family(family: str) -> None:
    """A position takes what one takes in a context, whatever the kind of layers."""
    model = make_model(family, dtype=torch.bfloat16)
    context = model.compress(torch.tensor([tokens(37)]))
    blueprint = Blueprint(model.config, model.decoder.config)
    assert planning.position_bytes(blueprint.build()) == context.nbytes / len(context)
    found = planning.activations(blueprint, Batch(2, 48, 4, 20))
    assert 0 < found.checkpointed < found.kept


# ---------------------------------------------------------------- what a training pass keeps
def allocated(model: RCCForCausalLM, batch: Batch, dtype: torch.dtype) -> int:
    """Bytes that torch allocates at most, less gradients, while a real model learns, by torch's own profiler."""
    generator = torch.Generator().manual_seed(0)
    ids, prompt = (torch.randint(1, 500, (batch.rows, n), generator=generator) for n in (batch.tokens, batch.target))
    objective = Objective(model, dtype).train()

    def step() -> None:
        keep = torch.arange(batch.target - 1)
        objective(prompt, prompt, keep, ids, batch.rate)["loss"].backward()

    step()
    for p in model.parameters():  # they are there: what is added to them is not kept
        p.grad = None if p.grad is None else torch.zeros_like(p.grad)
    return memory.allocated(step)


WAYS: dict[str, tuple[int, list[str], bool, torch.dtype, str]] = {
    "LoRA": (8, [], False, torch.bfloat16, "sdpa"),
    "LoRA, checkpointed": (8, [], True, torch.bfloat16, "sdpa"),
    "LoRA, frozen": (8, ["encoder"], False, torch.bfloat16, "sdpa"),
    "all weights": (0, [], False, torch.bfloat16, "sdpa"),
    "all weights, checkpointed": (0, [], True, torch.bfloat16, "sdpa"),
    "float32, eager": (8, [], False, torch.float32, "eager"),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_activations(way: tuple[int, list[str], bool, torch.dtype, str]) -> None:
    """Eight blocks, of which three are run: between what torch allocates for the real model and half as much again."""
    lora, frozen, recompute, dtype, attention = way
    shape = AutoConfig.for_model(
        "llama",
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        attn_implementation=attention,
    )
    config = RCCConfig(
        segment_length=128, rates=[8], share_base=lora > 0, encoder_lora_rank=lora, decoder_lora_rank=lora
    )
    batch = Batch(4, 256, 8, 96)
    found = planning.activations(Blueprint(config, shape, None if lora else shape, dtype, attention), batch, frozen)
    sides = [AutoModelForCausalLM.from_config(shape, dtype=dtype) for _ in range(1 if lora else 2)]
    model = RCCForCausalLM.from_base(*sides, config=config)
    freeze(model, frozen, dtype)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    real = allocated(model, batch, dtype)
    assert real < (found.checkpointed if recompute else found.kept) < 1.5 * real


@pytest.mark.parametrize("rate", [1, 8])
def test_activations_of_a_direct_prefix(rate: int) -> None:
    """As of any other; at rate 1 the decoder reads what the encoder would."""
    shape = make_backbone("qwen2", 6, 64, vocab_size=512).config
    config = RCCConfig(
        segment_length=64, rates=[8, 1], prefix="direct", share_base=True, encoder_lora_rank=4, decoder_lora_rank=4
    )
    batch = Batch(4, 192, rate, 96)
    found = planning.activations(Blueprint(config, shape, None, torch.float32), batch)
    model = RCCForCausalLM.from_base(make_backbone("qwen2", 6, 64, vocab_size=512), config=config)
    freeze(model, (), torch.float32)
    real = allocated(model, batch, torch.float32)
    assert real < found.kept < 1.5 * real
    built = Blueprint(config, shape, None, torch.float32).build()
    assert planning._added(built)["sink"] == 6 * 64
    assert planning.position_bytes(built) == model.compress(torch.tensor([tokens(40)]), rate=8).nbytes // 5


@pytest.mark.parametrize("depths", [(5, 5), (4, 6), (6, 4)])
def test_three_blocks_stand_for_all(depths: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    upper, lower = make_backbone("gpt_neox", depths[0], 32).config, make_backbone("gpt_neox", depths[1]).config
    config = RCCConfig(segment_length=32, rates=[4], share_base=False, encoder_lora_rank=0, decoder_lora_rank=0)
    blueprint = Blueprint(config, lower, upper)
    for frozen in ([], ["encoder"]):
        few = planning.activations(blueprint, Batch(2, 128, 4, 64), frozen)
        with monkeypatch.context() as patch:
            patch.setattr(planning, "TRACED", 99)
            whole = planning.activations(blueprint, Batch(2, 128, 4, 64), frozen)
        assert few.kept == pytest.approx(whole.kept, rel=0.02)
        assert few.checkpointed == pytest.approx(whole.checkpointed, rel=0.05)


def test_blocks_of_every_kind_are_run() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 4}
    shape = AutoConfig.for_model("qwen3", **sliding, num_hidden_layers=6)
    cut = Blueprint(RCCConfig(), shape).shallow().decoder
    assert (cut.num_hidden_layers, len(cut.layer_types)) == (3, 3)
    assert set(cut.layer_types) == set(shape.layer_types) == {"full_attention", "sliding_attention"}
    assert len(shape.layer_types) == 6


@pytest.mark.parametrize("frozen", [[], ["encoder"]])
def test_a_state_space_encoder_is_not_run(frozen: list[str]) -> None:
    """Its share is 34 bytes · width a token and block, where it learns: 4 blocks of it run for 3 of the decoder."""
    config = RCCConfig(segment_length=32, rates=[4], share_base=False, encoder_lora_rank=0, decoder_lora_rank=0)
    blueprint = Blueprint(config, make_backbone("llama").config, make_backbone("mamba", 4, 32).config)
    found = planning.activations(blueprint, Batch(2, 128, 4, 64), frozen)
    other = planning.activations(blueprint, Batch(2, 128, 4, 64), ["encoder"])
    share = 34 * 32 * 2 * 128 * blueprint.states[-1]
    assert found.kept - other.kept == pytest.approx(0 if frozen else share, abs=0.05 * other.kept)


def test_what_grows_with_what() -> None:
    """Activations follow the texts of a batch, and nothing is random."""
    config = RCCConfig(segment_length=64, share_base=True, encoder_lora_rank=4, decoder_lora_rank=4)
    blueprint = Blueprint(config, make_backbone("llama").config)
    one, again, four = (planning.activations(blueprint, Batch(n, 256, 32, 64)) for n in (1, 1, 4))
    assert one == again
    assert four.kept == pytest.approx(4 * one.kept, rel=0.05)


# ---------------------------------------------------------------- the command
@pytest.mark.usefixtures("quick")
def test_json(call: Callable[..., str], tmp_path: Path) -> None:
    """The text shows the data's numbers."""
    folder = folder_of(make_backbone("llama"), tmp_path / "base")
    arguments = ["models", "--plan", folder, "--segment-length", 16, "--rates", "4, 8", "--lora-rank", 2]
    data = json.loads(call(*arguments, "--json"))
    assert data == json.loads(call("models", "--plan", folder / "config.json", *arguments[3:], "--json")) | {
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


def test_family_that_is_not_supported(call: Callable[..., str], tmp_path: Path) -> None:
    """Refused with the sentence that loading gives."""
    folder = tmp_path / "base"
    for family, shape in (("gpt2", {"n_embd": 8, "n_head": 2}), ("mamba", {"hidden_size": 8})):
        config = AutoConfig.for_model(family, **shape, num_hidden_layers=1, vocab_size=9)
        body = AutoModelForCausalLM.from_config(config)
        body.save_pretrained(folder)
        with pytest.raises(ModelError) as loading:
            RCCForCausalLM.from_base(folder)
        assert call("models", "--plan", folder, refused=True) == f"rcc: {loading.value}\n"
    (folder / "config.json").write_text('{"model_type": "of tomorrow"}')
    said = call("models", "--plan", folder, refused=True)
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
    for place in (tmp_path, tmp_path / "config.json"):
        assert words in call("models", "--plan", place, refused=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--plan nothing", "'nothing' is neither a known shape (gemma-3-1b,"),
        ("--plan some/model", "nor could it be fetched from the hub: HF_HUB_OFFLINE is set"),
        ("--plan ./nothing", "a config.json file nor a folder"),
        ("--plan rcc-smollm2-135m", "`rcc models` lists what comes with rcc, and its base is smollm2-135m-instruct"),
        ("--plan tests", "has no config.json"),
        ("--plan pythia-1.4b --rates 8,7", "rate=7 does not divide the segment of 2048 tokens: use one of 1, 2, 4"),
        ("--plan pythia-1.4b --rates 8;7", "are not rates"),
        ("--plan pythia-1.4b --segment-length 4096", "more than the 2048 positions that the encoder can address"),
        ("--plan pythia-1.4b --full --lora-rank 4", "leave out --lora-rank"),
        ("--plan pythia-1.4b --dtype int8", "--dtype int8 is unknown"),
        ("--plan pythia-1.4b --encoder nothing", "'nothing' is neither"),
        ("--rates 8", "--rates is for a plan"),
        ("--full", "--full is for a plan"),
    ],
)
def test_refused(arguments: str, words: str, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    assert words in call("models", *arguments.split(), refused=True)


# ---------------------------------------------------------------- docs/backbones.md
@pytest.mark.parametrize(("line", "shown"), PLANS, ids=[command.split()[-1] for command, _ in PLANS])
def test_plans_of_the_docs(line: str, shown: str, call: Callable[..., str], request: pytest.FixtureRequest) -> None:
    """What the page shows is what is printed. Of one model also the estimates, to a tenth: torch's versions differ."""
    whole = "pythia" in line
    if not whole:
        request.getfixturevalue("quick")
    about = re.compile(r" *about ([0-9.]+) GB")
    told = call(*shlex.split(line))
    assert about.sub(" about", told).split() == about.sub(" about", shown).split()
    for found, said in zip(about.findall(told), about.findall(shown), strict=True):
        assert not whole or float(found) == pytest.approx(float(said), rel=0.1, abs=0.1)


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
