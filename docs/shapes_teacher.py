"""Make the demo's teacher anew: train the classifier of a config, and store its backbone in half precision.

    python docs/shapes_teacher.py configs/shapes_teacher.yaml

Writes support/shapes_teacher.pt. Its head is left out: a teacher's features are all that the tokenizer asks for.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import finetune  # noqa: E402
from beitv2 import ModelError, read_checkpoint  # noqa: E402
from support.files import save_atomically  # noqa: E402
from support.launch import launch  # noqa: E402
from support.options import load_config  # noqa: E402
from support.teachers import SHAPES_TEACHER  # noqa: E402


def main() -> None:
    finetune.main()
    config = load_config(finetune.SECTIONS)
    content = read_checkpoint(Path(config.output_dir) / finetune.stage_folder(config.finetune) / "last.pt")
    weights = {name: value.half() for name, value in content["model"].items() if not name.startswith("head.")}
    save_atomically({"model": weights, "config": content["config"]}, SHAPES_TEACHER)


if __name__ == "__main__":
    launch(main, ModelError)
