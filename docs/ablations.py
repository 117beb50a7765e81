"""The paper's claims in small: one change to configs/ablations.yaml in each row of four tables.

    python docs/ablations.py data.root=PATH tokenizer.teacher_weights=PATH     # all runs; prints the tables at the end
    python docs/ablations.py seeds=1 ...                                       # only seed 1, for a second processor
    python docs/ablations.py tables                                            # only the tables of what has been run

Stopped with Ctrl-C, it goes on with the same command. A run writes into runs/ablations/ROW-SEED, as any experiment
does, and is left alone once it has ended. Further arguments go to every script.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import finetune  # noqa: E402
import pretrain  # noqa: E402
import tokenizer  # noqa: E402
from beitv2 import ModelError  # noqa: E402
from support.compare import as_markdown, mean_and_deviation  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.figures import figures_of, titles_of  # noqa: E402
from support.launch import launch  # noqa: E402
from support.processes import say  # noqa: E402

CONFIG, FOLDER, SEEDS = "configs/ablations.yaml", Path("runs/ablations"), (0, 1, 2)

# Each block: what its runs do after the tokenizer, and its rows: a title, the folder's name, and what is changed. A row
# that changes nothing of stage 1 takes the tokenizer of the first row, `default`.
KNN, PROBE, FINETUNE = (pretrain, []), (finetune, ["finetune.mode=linear_probe"]), (finetune, [])
TARGETS = [
    ("VQ-KD, teacher CLIP (default)", "default", []),
    ("VQ-KD, teacher HOG", "hog", ["tokenizer.teacher=hog"]),
    ("VQ-KD, teacher raw pixels", "pixels", ["tokenizer.teacher=pixels"]),
    ("k-means of CLIP's features, no encoder", "kmeans", ["tokenizer.encoder=teacher"]),
    ("an untrained tokenizer", "untrained", ["tokenizer.lr=0", "tokenizer.min_lr=0", "tokenizer.epochs=1"]),
    ("nothing: no pre-training", "none", ["finetune.weights=none"]),
]
AGGREGATION = [
    ("aggregation head, shared output layer, l = 3 of 4 (default)", "default", []),
    ("no aggregation head", "nohead", ["pretrain.head_layers=0"]),
    ("a norm and an output layer of its own for the head", "separate", ["pretrain.shared_lm_head=false"]),
    ("l = 2", "early2", ["pretrain.early_layers=2"]),
    ("l = 4, the last layer", "early4", ["pretrain.early_layers=4"]),
]
MASKS = [
    ("blocks, 6 of 16 patches (default)", "default", []),
    ("single patches, 6 of 16", "single", ["pretrain.min_block=0"]),
    ("blocks, 4 of 16", "mask4", ["pretrain.num_masked=4"]),
    ("blocks, 10 of 16", "mask10", ["pretrain.num_masked=10"]),
    ("blocks, 12 of 16", "mask12", ["pretrain.num_masked=12"]),
]
CODEBOOK = [
    ("K = 256, C = 32 (default)", "default", []),
    ("K = 64", "k64", ["tokenizer.codebook_size=64"]),
    ("K = 1024", "k1024", ["tokenizer.codebook_size=1024"]),
    ("C = 8", "d8", ["tokenizer.codebook_dim=8"]),
    ("C = 192", "d192", ["tokenizer.codebook_dim=192"]),
    ("no k-means start", "randomstart", ["tokenizer.kmeans_init=false"]),
    ("no revival", "norevival", ["tokenizer.revive_below=0"]),
    ("decoder of 3 blocks", "decoder3", ["tokenizer.decoder_depth=3"]),
    ("initial weights of std 0.02", "std02", ["tokenizer.init_std=0.02"]),
]
BLOCKS = [
    ("What is predicted", TARGETS, [KNN, PROBE, FINETUNE], SEEDS),
    ("Patch aggregation", AGGREGATION, [KNN, PROBE], SEEDS),
    ("Masks", MASKS, [KNN, PROBE], SEEDS),
    ("Codebook", CODEBOOK, [], SEEDS[:1]),
]


def stage_of(script, arguments: list[str]) -> str:
    """The name under which a script with these arguments keeps its results."""
    return next((a.partition("=")[2] for a in arguments if a.startswith("finetune.mode=")), script.__name__)


def run(name: str, seed: int, script, arguments: list[str]) -> None:
    """One stage of one run, unless it has been done."""
    folder, stage = FOLDER / f"{name}-{seed}", stage_of(script, arguments)
    done = folder / f"{stage}.done"
    if not done.exists():
        say(f"\n--- {folder}, {stage}")
        sys.argv = [f"{script.__name__}.py", CONFIG, f"output_dir={folder}", f"seed={seed}", *arguments]
        script.main()
        done.touch()


def run_block(rows: list, stages: list, seeds: tuple[int, ...], arguments: list[str]) -> None:
    for seed in seeds:
        for _, name, changes in rows:
            own_tokenizer = any(change.startswith("tokenizer.") for change in changes)
            if own_tokenizer or name == "default":
                run(name, seed, tokenizer, [*arguments, *changes])
            weights = [] if own_tokenizer else [f"pretrain.tokenizer_weights={FOLDER}/default-{seed}/tokenizer/last.pt"]
            for script, options in stages:
                if name == "none" and script is pretrain:  # its k-NN is measured without a stage 2
                    run(name, seed, finetune, [*arguments, *changes, "finetune.mode=knn"])
                else:
                    run(name, seed, script, [*arguments, *changes, *weights, *options])


def print_tables() -> None:
    """Means over the seeds that have been run, and standard deviations where there are two or more."""
    for block, rows, stages, _ in BLOCKS:
        # A row may have more stages, of another block. k-NN without a stage 2 is a stage of its own.
        measured = {stage_of(*stage) for stage in stages or [(tokenizer, [])]} | {"knn"}
        figures = {title: [figures_of(FOLDER / f"{name}-{seed}", "_scratch" if name == "none" else "", measured)
                           for seed in SEEDS] for title, name, _ in rows}
        figures = {title: [run for run in runs if run] for title, runs in figures.items()}
        titles = titles_of([run for runs in figures.values() for run in runs])
        table = [[block.lower(), "change", "seeds", *titles]]
        for title, _, changes in rows:
            cells = (mean_and_deviation(key, figures[title]) for key in titles)
            table.append([title, " ".join(f"`{change}`" for change in changes), str(len(figures[title])), *cells])
        print(f"\n{as_markdown(table)}")


def main() -> None:
    arguments = sys.argv[1:]
    named = [seed for a in arguments if a.startswith("seeds=") for seed in a.partition("=")[2].split(",")]
    if unknown := set(named) - set(map(str, SEEDS)):
        raise UserError(f"seeds={','.join(sorted(unknown))}: the seeds are {', '.join(map(str, SEEDS))}, such as "
                        f"seeds=0,2")
    chosen = [int(seed) for seed in named] or SEEDS
    rest = [a for a in arguments if not a.startswith("seeds=") and a != "tables"]
    if "tables" not in arguments:
        for _, rows, stages, seeds in BLOCKS:
            run_block(rows, stages, tuple(seed for seed in seeds if seed in chosen), rest)
    print_tables()


if __name__ == "__main__":
    launch(main, ModelError)
