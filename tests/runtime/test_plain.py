"""Dataclasses as plain data, with nested ones in the outer one's table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rcc import RCCConfig, SideConfig
from rcc.runtime.plain import inline, make, settings_of, to_plain


@dataclass
class Wheel:
    size: int
    spokes: list[int] = field(default_factory=list)


@dataclass
class Bicycle:
    name: str
    front: Wheel = field(default_factory=lambda: Wheel(28), metadata=inline("front_"))
    back: Wheel = field(default_factory=lambda: Wheel(26), metadata=inline("back_", without=("spokes",)))
    spare: list[Wheel] = field(default_factory=list)


def test_a_nested_dataclass_stands_in_the_table() -> None:
    bicycle = Bicycle("b", Wheel(1, [2, 3]), Wheel(4), [Wheel(5)])
    table = to_plain(bicycle)
    assert list(table) == ["name", "front_size", "front_spokes", "back_size", "spare"]
    assert table["spare"] == [{"size": 5, "spokes": []}]
    assert make(Bicycle, {**table, "spare": bicycle.spare}) == bicycle
    table["front_spokes"].append(4)
    assert bicycle.front.spokes == [2, 3]  # nothing is shared


def test_what_a_table_has_to_say() -> None:
    settings = settings_of(Bicycle)
    assert [key for key, setting in settings.items() if setting.required] == ["name", "front_size", "back_size"]
    assert settings["front_spokes"].hint == list[int]


def test_sides_are_flat_in_files(tmp_path: Path) -> None:
    config = RCCConfig(encoder=SideConfig(lora_rank=4), decoder=SideConfig(lora_rank=0))
    keys = list(config.settings())
    assert keys[keys.index("share_base") :][:4] == [
        "share_base",
        "encoder_lora_rank",
        "decoder_lora_rank",
        "lora_alpha",
    ]
    config.save(tmp_path)
    assert RCCConfig.load(tmp_path) == config


@pytest.mark.parametrize(("share", "rank"), [(True, 16), (False, 0)])
def test_what_is_left_open_is_decided(share: bool, rank: int) -> None:
    config = RCCConfig(share_base=share, decoder=SideConfig(lora_rank=2))
    config.decide(one_base=True)
    assert (config.encoder.lora_rank, config.decoder.lora_rank) == (rank, 2)
    assert (config.is_frozen("encoder"), config.is_frozen("decoder")) == (share, True)
