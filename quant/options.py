"""Groups of options that several of g2quant's commands take."""

from __future__ import annotations

import click

from ..commands import choice, path_option, together

MEASURES = ("linear", "every", "block")


class Listed(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Names separated by commas."""

    name = "A,B,…"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[str]:
        """The names."""
        return [part.strip() for part in str(value).split(",") if part.strip()]


calibration = together(
    click.option(
        "--calibration",
        metavar="self|none|FILE",
        default="self",
        show_default=True,
        help="Whose inputs decide: text the model writes itself, or a .txt, .jsonl (text, or messages of a chat) or .npy "
        "file of token ids; with none the model is not run and weights are rounded to nearest.",
    ),
    click.option(
        "--samples",
        type=int,
        help="Calibration sequences.  [default: 128; 32 above 1e9 parameters on a processor]",
    ),
    click.option(
        "--seq-len", type=int, help="Tokens of each.  [default: 512, or the model's context]"
    ),
    click.option(
        "--held-out",
        type=float,
        show_default="0.125",
        help="Further sequences, as a share of --samples, that judge the result.",
    ),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Of what the model writes."
    ),
)


def _measuring(tokens: str) -> list[object]:
    return [
        click.option(
            "--choices", type=Listed(), metavar="A,B,…",
            help="Schemes to choose from, such as 3g128,4g32,8row or Q4_K,Q6_K.  [default: all of the format]",
        ),
        choice(
            "measure", MEASURES, "linear",
            "How sensitivities are measured: every scheme of every weight; one scheme of every weight, the others from "
            "the errors they leave; or one scheme of a whole block, in a seventh of the time.",
        ),
        click.option(
            f"--{tokens}", type=int, default=1024, show_default=True,
            help="Held-out tokens to measure sensitivities on.",
        ),
    ]  # fmt: skip


measuring = together(*_measuring("tokens"))  # type: ignore[arg-type]
target = together(
    click.option(
        "--target-size", metavar="SIZE",
        help="Bytes that all files of weights may have, such as 1.6GiB: bits and groups are chosen weight by weight. For "
        "--format compressed-tensors, gptq, mlx or gguf.",
    ),
    click.option(
        "--target-bpw", metavar="BITS", help="The same by stored bits per linear weight, such as 3.5."
    ),
    path_option("sensitivity", "Sensitivities that `g2quant sensitivity` kept, in place of measuring."),
    *_measuring("measure-tokens"),  # type: ignore[arg-type]
)  # fmt: skip
