"""Which expert takes a class that comes late? The paper's two-stage classifier (Appendix B), AoE
beside router MoE.

`python -m aoe_jax.compare.two_stage [--seeds=20] [--steps=1000] [--d_model=32] [--json=FILE]
[--output=DIR]` prints a table, writes the figures of every seed to a file, and draws
`two_stage.png` and `two_stage.svg` (the paper's Fig. 5) into a folder.

One layer of two experts, top-1, and a linear head on its output. Inputs are Gaussian of variance 1:
class 1 around +mean, class 2 around -mean, class 3 around 0. Stage one trains on classes 1 and 2,
stage two, as long, on all three. Reported is the share of each class that each expert serves at the
end of each stage, and how often it ends as in the paper: one expert of AoE serves classes 1 and 2
and the other class 3 (`apart`), while a router spreads class 3 over both (`spread`).

With top-1 the paper's gate, a softmax over the chosen expert alone, is constantly 1. A router then
has no gradient and chooses as it was drawn; AoE's choice moves only with the activations that its
experts compute on. With gate=all, the softmax over both experts, there is a gradient to the chosen
score. Both are run.
"""

import dataclasses
from pathlib import Path

from absl import flags

from aoe_jax import cli
from aoe_jax.errors import UserError
from aoe_jax.json_files import write_json

_SEEDS = flags.DEFINE_integer("seeds", 20, "how often each layer is trained")
_STEPS = flags.DEFINE_integer("steps", 1000, "training steps of each stage")
_D_MODEL = flags.DEFINE_integer(
    "d_model", 32, "width of the inputs; experts are twice as wide, of a quarter of its rank"
)
_JSON = flags.DEFINE_string("json", None, "a file for the figures")
_OUTPUT = flags.DEFINE_string("output", None, "a folder for the picture")


def _make_folder(folder, flag):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"--{flag.name}={flag.value}: {folder} can't be made ({e.strerror}); name another place"
        ) from e


def _destinations():
    """The file and the folder to write to, or None; what can't be written to is found out before
    the training.
    """
    file = Path(_JSON.value).expanduser() if _JSON.value else None
    folder = Path(_OUTPUT.value).expanduser() if _OUTPUT.value else None
    if file:
        _make_folder(file.parent, _JSON)
        if file.is_dir():
            raise UserError(f"--json={_JSON.value}: is a folder; name a file")
    if folder:
        _make_folder(folder, _OUTPUT)
    return file, folder


def main():
    """Trains all arms, prints the table, writes what is asked for."""
    for flag, least in ((_SEEDS, 2), (_STEPS, 1), (_D_MODEL, 2)):
        if flag.value < least:
            raise UserError(f"--{flag.name}={flag.value}: must be {least} or more")
    file, folder = _destinations()
    from aoe_jax.compare.late_class import ARMS, ENDINGS, Setting, draw, summary, table, train_seeds

    setting = Setting(steps=_STEPS.value, d_model=_D_MODEL.value)
    figures = [
        summary(arm, train_seeds(*layer, setting, _SEEDS.value)) for arm, layer in ARMS.items()
    ]
    print("\n".join(table(figures)))
    if file:
        settings = {"seeds": _SEEDS.value, **dataclasses.asdict(setting)}
        write_json(file, {"setting": settings, "endings": ENDINGS, "figures": figures})
    if folder:
        picture = draw(figures, setting)
        for kind in ("png", "svg"):
            picture.savefig(folder / f"two_stage.{kind}", dpi=130)


if __name__ == "__main__":
    cli.run(main)
