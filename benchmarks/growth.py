"""Growth of communication and predicted step time with the number of chips: AoE beside router MoE,
by transport.

`python -m benchmarks.growth --output=DIR [--chips=16,32,64,128,256] [--tokens_per_chip=16384]
[--batch=256]` draws `growth.png` and `growth.svg` and writes `growth.json`. The models are
configs/large.py's 8 of 64 experts on TPU v5p. Weak scaling keeps the tokens of a chip; strong
scaling keeps the batch of `--batch` sequences of 4096. Programs are traced, not compiled: bytes are
those of the collectives in the program, and step times are bounds from public peak figures, see
`aoe_jax/planning/`.

FSDP splits parameters over all chips. The other arms split experts over 16 chips and the rest over
FSDP. The last lines say from which number of chips on which arm receives least.
"""

import dataclasses

from absl import flags
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from aoe_jax import cli
from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.run import Config
from aoe_jax.planning.hardware import machine, topology_devices
from aoe_jax.planning.plan import plan
from aoe_jax.storage.files import write_json
from benchmarks.timing import check_names
from configs import large

TOPOLOGIES = {"16": "2x2x4", "32": "2x4x4", "64": "4x4x4", "128": "4x4x8", "256": "4x8x8"}
EXPERT_SHARDS = 16
ARMS = {
    "AoE, FSDP": ("aoe_64", None),
    "AoE, ring": ("aoe_64", "ring"),
    "AoE, all_to_all": ("aoe_64", "all_to_all"),
    "MoE, FSDP": ("moe_64", None),
    "MoE, ring": ("moe_64", "ring"),
    "MoE, all_to_all": ("moe_64", "all_to_all"),
}
COLOURS = {"FSDP": "tab:gray", "ring": "tab:blue", "all_to_all": "tab:orange"}

_OUTPUT = flags.DEFINE_string("output", None, "a folder for the figures")
_CHIPS = flags.DEFINE_list("chips", list(TOPOLOGIES), f"of {', '.join(TOPOLOGIES)}")
_TOKENS = flags.DEFINE_integer(
    "tokens_per_chip", 16384, "of weak scaling, in sequences of 4096", lower_bound=4096
)
_BATCH = flags.DEFINE_integer("batch", 256, "sequences of 4096 of strong scaling", lower_bound=1)


def configuration(arm, n_chips, sequences):
    """A configuration of configs/large.py on that many chips, one micro-batch a step."""
    variant, transport = ARMS[arm]
    config = Config.from_config_dict(large.get_config(variant))
    mesh = MeshConfig(data=1, fsdp=n_chips)
    if transport:
        mesh = MeshConfig(
            data=1, fsdp=n_chips // EXPERT_SHARDS, expert=EXPERT_SHARDS, transport=transport
        )
    train = dataclasses.replace(config.train, batch_size=sequences)
    return dataclasses.replace(config, mesh=mesh, train=train)


def draw(figures, folder):
    """Received bytes and predicted step time against chips, weak and strong."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for row, scaling in zip(axes, ("weak", "strong"), strict=True):
        for arm in ARMS:
            points = [f for f in figures if f["arm"] == arm and f["scaling"] == scaling]
            chips = [f["chips"] for f in points]
            kind, way = arm.split(", ")
            style = {
                "linestyle": "-" if kind == "AoE" else "--",
                "color": COLOURS[way],
                "label": arm,
            }
            style |= {"marker": "o" if kind == "AoE" else "x", "markersize": 4}
            row[0].plot(chips, [sum(f["collective_bytes"].values()) / 1e9 for f in points], **style)
            row[1].plot(chips, [f["step_seconds"] for f in points], **style)
        row[0].set_ylabel(f"{scaling} scaling\nreceived by a chip per step [GB]")
        row[1].set_ylabel("predicted step time, at least [s]")
        for ax in row:
            ax.set_xscale("log", base=2)
            if scaling == "strong":
                ax.set_yscale("log")
                ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter("{x:g}")
            else:
                ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("TPU v5p chips")
        ax.set_xticks(chips, [str(n) for n in chips])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    for kind in ("png", "svg"):
        figure.savefig(folder / f"growth.{kind}", dpi=120)


def overtakings(figures):
    """A sentence for each kind and scaling: the order of the arms by bytes received, and the
    numbers of chips at which it changes.
    """
    for scaling in ("weak", "strong"):
        for kind in ("AoE", "MoE"):
            orders = []
            for n in sorted({f["chips"] for f in figures}):
                points = [
                    f
                    for f in figures
                    if f["scaling"] == scaling and f["chips"] == n and f["arm"].startswith(kind)
                ]
                points.sort(key=lambda f: sum(f["collective_bytes"].values()))
                order = " < ".join(f["arm"].removeprefix(f"{kind}, ") for f in points)
                if not orders or orders[-1][1] != order:
                    orders.append((n, order))
            yield f"{kind}, {scaling} scaling, bytes received: " + "; ".join(
                f"from {n} chips {o}" for n, o in orders
            )


def main():
    folder = cli.path_of(_OUTPUT)
    check_names("chips", _CHIPS.value, TOPOLOGIES)
    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for chips in _CHIPS.value:
        n, (generation, devices) = int(chips), topology_devices(f"v5p:{TOPOLOGIES[chips]}")
        for scaling, sequences in (("weak", n * (_TOKENS.value // 4096)), ("strong", _BATCH.value)):
            for arm in ARMS:
                result = plan(configuration(arm, n, sequences), generation, devices, compiles=False)
                figures.append({"arm": arm, "scaling": scaling, "chips": n, **result})
                gigabytes = sum(result["collective_bytes"].values()) / 1e9
                print(
                    f"{n:4} chips {scaling:>6} {arm:<16}: {gigabytes:7.2f} GB received by a chip, "
                    f"step at least {result['step_seconds']:.3f} s, bound by {result['bound_by']}",
                    flush=True,
                )
    for sentence in overtakings(figures):
        print(sentence)
    draw(figures, folder)
    write_json(folder / "growth.json", {"machine": machine(), "figures": figures})


if __name__ == "__main__":
    cli.run(main)
